"""Messages of chat completions, as clients of OpenAI's interface send them."""

import base64
import io

from PIL import Image

from tests.support.conversations import random_image


def data_uri(image: Image.Image) -> str:
    image.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_part(*size: int) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(random_image(*size, seed=sum(size)))}}


def user(*parts: str | dict) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content if len(parts) > 1 else parts[0]}
