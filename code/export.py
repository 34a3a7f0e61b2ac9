"""A network as an ONNX file, for programs without torch: evaluate.py --export."""

import warnings
from pathlib import Path

import checkpoint
import numpy as np
import torch
from refused import Refused

TOLERANCE = 1e-4  # of the embeddings, onnxruntime against torch


def to_onnx(network, image_size: int, path: Path) -> None:
    """Write a network in float32, for batches of any size: images (N, 3, H, W) -> embeddings (N, D).

    Preprocessing is stored in the file's metadata. Where onnxruntime is installed, its embeddings are compared with
    torch's. Raises Refused if they differ, if the network cannot be exported, or if packages are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Refused(f"--export: {error.name} is not installed (pip install onnx onnxscript)") from error
    network.eval()
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own parts
        names = {"input_names": ["images"], "output_names": ["embeddings"]}
        sizes = ({0: torch.export.Dim("batch")},)
        try:
            program = torch.onnx.export(
                network, (images[:2],), dynamo=True, verbose=False, dynamic_shapes=sizes, **names
            )
        except torch.onnx.OnnxExporterError as error:  # some networks of timm cannot be traced
            raise Refused(f"--export: torch cannot export {network.name} ({str(error).strip()[:200]})") from error
    program.model.metadata_props.update(
        {
            "image_size": str(image_size),
            "resize": f"shorter side to {round(image_size * 256 / 224)} pixels, then the middle",
            "channels": "BGR" if network.bgr else "RGB",
            "range": f"0 to {network.scale:g}",
            "mean": str(list(network.mean)),
            "std": str(list(network.std)),
        }
    )
    content = program.model_proto.SerializeToString()
    compared = compare(network, images, content)
    checkpoint.write(lambda file: file.write(content), path)
    print(f"exported: {path} ({len(content) / 2**20:.0f} MiB; {compared})")


def compare(network, images: torch.Tensor, content: bytes) -> str:
    """How far onnxruntime's embeddings are from torch's, in words. Raises Refused if too far."""
    try:
        import onnxruntime
    except ImportError:
        return "not compared, onnxruntime is not installed"
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        difference = np.abs(session.run(None, {"images": images.numpy()})[0] - network(images).numpy()).max()
    if not difference < TOLERANCE:
        raise Refused(f"--export: onnxruntime's embeddings differ from torch's by {difference:.1e}, not written")
    return f"onnxruntime differs from torch by at most {difference:.1e}"
