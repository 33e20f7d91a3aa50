"""What has to work where nothing but fastreg and its dependencies is installed."""

import importlib.util
import warnings
from importlib import metadata, resources

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # fastreg does without, and PyTorch says so

import torch

import fastreg

if importlib.util.find_spec("kernels") is not None:
    raise SystemExit("this installs a top-level package named kernels, which belongs to another project")
if not (resources.files("fastreg") / "py.typed").is_file():
    raise SystemExit("py.typed is missing, so type checkers ignore the annotations")
if metadata.version("fastreg-torch") != fastreg.__version__:
    raise SystemExit("the metadata and fastreg.__version__ disagree")
if not (resources.files("fastreg") / "kernels" / "launch.py").is_file():
    raise SystemExit("the kernels are missing; PyTorch's CUDA and ROCm builds bring Triton, which is all they need")
if not (resources.files("fastreg") / "integrations" / "lightning.py").is_file():
    raise SystemExit("the callbacks are missing")
if importlib.util.find_spec("triton") is not None:
    import fastreg.kernels

model = torch.nn.Linear(3, 2)
penalty = fastreg.elastic_penalty(model, l1=1.0)
penalty.backward()
expected = sum(p.detach().abs().sum() for p in model.parameters())
torch.testing.assert_close(penalty.detach(), expected)
print(f"fastreg {fastreg.__version__} imports and runs where it was installed")
