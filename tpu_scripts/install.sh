#!/bin/sh
# On a worker: install.sh HOME SHA PYTHON [EXTRAS] makes the code in HOME/code/SHA ready to run, with the
# packages that it names, with EXTRAS such as [tpu], or those of the interpreter PYTHON if that is
# not empty, and writes what it has made into `.ready`. setup.sh calls it.
set -eu
home=$1 sha=$2 python=$3 extras=${4:-}
cd "$home/code/$sha"
mkdir -p .venv/bin "$home/runs_of_programs"
if [ -n "$python" ]; then
  printf '#!/bin/sh\nPYTHONPATH=%s exec %s "$@"\n' "'$PWD'" "'$python'" >.venv/bin/python
  printf '#!/bin/sh\nPYTHONPATH=%s exec %s -m cir_jax.cli "$@"\n' "'$PWD'" "'$python'" >.venv/bin/cir-jax
  chmod +x .venv/bin/python .venv/bin/cir-jax
else
  # The image's python is older than what jax needs.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv ||
    curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --python 3.12 --allow-existing .venv
  uv pip install --quiet --python .venv/bin/python -e ".$extras"
fi
# A relative run directory stays where it is when the code changes.
[ -e runs ] || ln -s "$home/runs_of_programs" runs
.venv/bin/python - "$sha" >.ready.new <<'PYTHON'
import importlib.metadata, platform, sys

found = {"sha": sys.argv[1], "python": platform.python_version()}
for name in ("jax", "libtpu"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = "none"
print(*(f"{name}={value}" for name, value in found.items()))
PYTHON
cp tpu_scripts/supervisor.py "$home/supervisor.py.new"
mv "$home/supervisor.py.new" "$home/supervisor.py"
mv .ready.new .ready
