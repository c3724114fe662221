"""Guard a model's `generate`: a question about a picture, with a guard made before.

python examples/generate.py MODEL GUARD PICTURE
"""

import sys

from PIL import Image

from vlm_safeguard import Guard, load

loaded = load(sys.argv[1])
guard = Guard.from_pretrained(sys.argv[2])
messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": Image.open(sys.argv[3]).convert("RGB")},
            {"type": "text", "text": "What is in this picture?"},
        ],
    }
]
inputs = guard.prepare(loaded.processor, messages).to(loaded.device)
with guard.attach(loaded.model, loaded.processor) as session:
    output = loaded.model.generate(**inputs, max_new_tokens=32)
    print("steered:", session.decisions[0].fired)
print(loaded.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
