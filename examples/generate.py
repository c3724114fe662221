"""Guard a model's `generate`: a question about a picture, with a guard made before.

python examples/generate.py MODEL GUARD PICTURE
"""

import sys

from vlm_safeguard import Guard, load
from vlm_safeguard.data.image_io import open_image

loaded = load(sys.argv[1])
guard = Guard.from_pretrained(sys.argv[2])
messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": open_image(sys.argv[3])},
            {"type": "text", "text": "What is in this picture?"},
        ],
    }
]
inputs = guard.prepare(loaded.processor, messages).to(loaded.device)
with guard.attach(loaded.model, loaded.processor) as session:
    output = loaded.model.generate(**inputs, max_new_tokens=32)
    print("steered:", session.decisions[0].fired)
print(loaded.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
