"""A guarded conversation of several turns: each request is sent whole, with all earlier turns.

python examples/conversation.py MODEL GUARD PICTURE
"""

import sys

from vlm_safeguard import Guard, load
from vlm_safeguard.data.image_io import open_image

loaded = load(sys.argv[1])
guard = Guard.from_pretrained(sys.argv[2])
picture = {"type": "image", "image": open_image(sys.argv[3])}
messages = []
with guard.attach(loaded.model, loaded.processor):
    for number, question in enumerate(("What is in this picture?", "What is it used for?")):
        content = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content if number else [picture, *content]})
        inputs = guard.prepare(loaded.processor, messages).to(loaded.device)
        output = loaded.model.generate(**inputs, max_new_tokens=32)
        answer = loaded.processor.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}")
