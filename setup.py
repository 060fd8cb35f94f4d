"""Builds the fused LSTM of csrc/ as the module rnn_C, and installs it with rnn.py.

    python setup.py develop      or      pip install --no-build-isolation .     (or -e .)

Neither is needed to use rnn.py: without rnn_C it runs its plain path, and rnn.build() compiles
csrc/ just in time. The build is for the machine at hand, with all its vector instructions; and for
GPUs where torch has CUDA and its toolkit is found, whether there is a GPU now or not.
"""

import os
import pathlib
import sys

# setuptools' develop calls pip, which would build in an environment of its own, without torch. Of
# this option pip reads the *value*: 0 stands for "no isolation".
os.environ.setdefault("PIP_NO_BUILD_ISOLATION", "0")

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit("setup.py needs torch: pip install torch ninja, and with pip install . also the "
             "option --no-build-isolation")

from setuptools import setup

here = pathlib.Path(__file__).parent.resolve()
os.chdir(here)  # paths below are relative to it
sys.path.insert(0, str(here))

from csrc import build  # noqa: E402

(compile_flags, link_flags), cuda = build.flags(), build.cuda_sources()
Extension = CUDAExtension if cuda else CppExtension
setup(
    name="rnn-reference",
    version="0.1.0",
    description="Recurrent networks in one file, with a fused LSTM",
    py_modules=["rnn"],
    packages=["rnn_C"],
    package_dir={"rnn_C": "csrc"},
    python_requires=">=3.11",
    install_requires=["torch>=2.11"],
    extras_require={"test": ["pytest", "ninja", "pybind11"]},
    ext_modules=[Extension(f"rnn_C.{build.library()}",
                           [f"csrc/{name}" for name in build.SOURCES + cuda],
                           extra_compile_args={"cxx": compile_flags, "nvcc": build.cuda_flags()},
                           extra_link_args=link_flags)],
    cmdclass={"build_ext": BuildExtension},
)
