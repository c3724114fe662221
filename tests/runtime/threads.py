"""A generation that stops half-way, and calls in other threads."""

import threading


class Stops:
    """A streamer that waits in the middle of a generation."""

    def __init__(self, then=None):
        self.there, self.go, self.then, self.calls = threading.Event(), threading.Event(), then, 0

    def put(self, _):
        self.calls += 1
        if self.calls == 3:
            self.there.set()
            if self.then:
                self.then()
            else:
                self.go.wait(10)

    def end(self):
        pass


def in_thread(function, *args, **kwargs):
    """Start a call; returns its thread and where its result or exception will be."""
    box = []

    def run():
        try:
            box.append(function(*args, **kwargs))
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, box
