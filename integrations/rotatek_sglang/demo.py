"""`python -m rotatek_sglang.demo`: serve a tiny random model, ask about an image, print what came back.

It shows that everything runs, on a CPU too; the answer of a random model is nonsense.
"""

import base64
import io
import json
import re
import tempfile
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw

from rotatek_sglang.process import HOST, running
from rotatek_sglang.tiny import save_model


def main() -> None:
    """Make the model, start the server, ask."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model("qwen2_5_vl", folder / "model")
        command = ["rotatek_sglang.launch", "--model-path", str(folder / "model"), "--sparsity", "0.75"]
        command += ["--dtype", "float32", "--max-total-tokens", "8192", "--mem-fraction-static", "0.3"]
        print("Starting", " ".join(["python -m", *command]))
        with running(command, folder / "log") as port:
            lines = re.findall(r"RotateK.*", (folder / "log").read_text(encoding="utf-8"))
            print(*lines, sep="\n")
            image = Image.new("RGB", (448, 448), "navy")
            ImageDraw.Draw(image).ellipse([100, 100, 300, 300], fill="red")
            file = io.BytesIO()
            image.save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
            body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 16}
            request = urllib.request.Request(
                f"http://{HOST}:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as reply:
                answer = json.load(reply)
            print(f"{answer['usage']['prompt_tokens']} prompt tokens; the answer, of a model that knows nothing:")
            print(repr(answer["choices"][0]["message"]["content"]))


if __name__ == "__main__":
    main()
