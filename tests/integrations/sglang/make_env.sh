#!/usr/bin/env bash
# Prepare a virtual environment with SGLang on a CPU, for the server tests and for trying the adapter without a GPU.
#
#     tests/integrations/sglang/make_env.sh [FOLDER]          default: .venv-sglang in the checkout
#     CUDA=1 tests/integrations/sglang/make_env.sh [FOLDER]   on a GPU: torch, torchvision and triton are the machine's
#
# Nothing is done if the folder is up to date. SGLang's metadata ask for a CUDA build of torch; here it runs on the
# CPU build that `make test` uses, with the versions of requirements-cpu.txt.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
venv=$(realpath -m "${1:-$root/.venv-sglang}")
pins=$root/tests/integrations/sglang/requirements-cpu.txt

if [ -n "${CUDA:-}" ]; then
    # For gpu.py, which says what stands in for SGLang's kernels. PIP_FIND_LINKS=WHEELS PIP_NO_INDEX=1 without a network.
    "${PYTHON:-python3}" -m venv --system-site-packages "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    "${pip[@]}" install --quiet --no-deps -r <(grep -Ev '^(torchvision|triton)==' "$pins")
    "${pip[@]}" install --quiet --no-deps --no-build-isolation -e "$root"
    exit 0
fi

stamp=$(cat "$pins" "$root/pyproject.toml" "${BASH_SOURCE[0]}" <(sed -n '/^torch==/p' "$root/constraints.txt") | sha256sum)
if [ -f "$venv/.sglang" ] && [ "$(cat "$venv/.sglang")" = "$stamp" ]; then
    exit 0
fi

make --no-print-directory -C "$root" VENV="$venv" "$venv/.torch"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
echo "Installing SGLang into $venv, some minutes the first time"
"${pip[@]}" install --quiet --no-deps -r "$pins"

# torchvision's wheel looks for operators of its CUDA build when it is imported; next to a CPU build of torch their
# schemas have to be declared first. Python runs the .pth line at every start.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$root/tests/integrations/sglang/torchvision_on_cpu.py" "$site/torchvision_on_cpu.py"
echo 'import torchvision_on_cpu' >"$site/torchvision_on_cpu.pth"

"${pip[@]}" install --quiet --no-deps --no-build-isolation -e "$root"
echo "$stamp" >"$venv/.sglang"
