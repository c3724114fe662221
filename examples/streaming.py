"""Stream a guarded answer: `generate` runs in a thread, and words are printed as they come.

python examples/streaming.py MODEL GUARD QUESTION
"""

import sys
from threading import Thread

from transformers import TextIteratorStreamer

from vlm_safeguard import Guard, load

loaded = load(sys.argv[1])
guard = Guard.from_pretrained(sys.argv[2])
inputs = guard.prepare(loaded.processor, [{"role": "user", "content": sys.argv[3]}])
streamer = TextIteratorStreamer(
    loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600
)


def answer() -> None:
    try:
        loaded.model.generate(**inputs.to(loaded.device), max_new_tokens=32, streamer=streamer)
    finally:
        streamer.end()  # also after an error, so that nobody waits for words that do not come


with guard.attach(loaded.model, loaded.processor):
    thread = Thread(target=answer)
    thread.start()
    for words in streamer:
        print(words, end="", flush=True)
    thread.join()
print()
