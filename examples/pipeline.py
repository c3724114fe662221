"""Guard a transformers pipeline: attach the guard to its model, and detach it at the end.

python examples/pipeline.py MODEL GUARD PICTURE

A pipeline makes the model's inputs by itself. A guard made with --read-pictures refuses them where
there is a picture, because nobody has read the words in it: for such a guard see generate.py.
"""

import sys

from transformers import pipeline

from vlm_safeguard import Guard, load
from vlm_safeguard.data.image_io import open_image

loaded = load(sys.argv[1])
guard = Guard.from_pretrained(sys.argv[2])
pipe = pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor)
session = guard.attach(loaded.model, loaded.processor)  # no `with`: for as long as you like
try:
    # Never pass the pipeline a request as somebody sent it: it fetches addresses and opens paths.
    picture = open_image(sys.argv[3])
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "What is in this picture?"},
            ],
        }
    ]
    answer = pipe(text=messages, max_new_tokens=32, return_full_text=False)
    print(answer[0]["generated_text"])
    print("steered:", session.decisions[0].fired)
finally:
    session.detach()
