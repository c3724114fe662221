"""The guard inside vLLM, as a plugin: armed by the environment variable ``VLM_SAFEGUARD``.

* ``plugin``: the entry point that vLLM calls in each of its processes; ``arming``,
  ``arming_runners``: what it does; ``patching``: how.
* ``requirements``: versions and settings of vLLM that can be guarded; ``identity``: the model's.
* ``pictures``, ``texts``, ``front_end``: in the front end. What a guard reads of a request as text.
* ``scheduling``: in the engine core. A request waits for the readings of its text.
* ``runner``, ``layer_operator``, ``step``: in the workers. Gates and steering in the flattened
  batch.
* ``messages``: what these tell each other. ``self_check``: a live check at start-up.
"""
