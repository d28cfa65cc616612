"""Python reads this file when it starts, if this folder is on PYTHONPATH. If
FAKE_CUDA is set, the process has the CUDA device that is not there, and so has each that it starts:

    PYTHONPATH=tests FAKE_CUDA=1 python -m analysis.card --small --device cuda
"""

import os

if os.environ.get("FAKE_CUDA"):
    import fake_cuda

    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # from any folder
    fake_cuda.install()
