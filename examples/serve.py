"""Ask a server with compressed caches about an image, through the OpenAI API.

Start the server first (a CUDA machine; `make demo-sglang` shows one with a tiny model on a CPU):

    python -m rotatek_sglang.launch --model-path Qwen/Qwen2.5-VL-7B-Instruct --basis basis.safetensors --bits 4
    python examples/serve.py --image photo.jpg --question "What is on the table?"

It needs nothing but Python; any client of the OpenAI API does as well.
"""

import argparse
import base64
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Send one question about one image and print the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--model", default="default", help="name that the server goes by")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", default="What is in this image?")
    args = parser.parse_args(argv)

    picture = f"data:image/png;base64,{base64.b64encode(args.image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": args.question}]
    body = {"model": args.model, "max_tokens": 64, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(  # noqa: S310 (the address is the user's own)
        f"{args.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310
        answer = json.load(reply)
    print(answer["choices"][0]["message"]["content"])
    print(f"{answer['usage']['prompt_tokens']} prompt tokens")


if __name__ == "__main__":
    main()
