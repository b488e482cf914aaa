#!/usr/bin/env bash
# Install what comes from npm (web/package-lock.json) into build/web, and lay out the page of the viewer in build/viewer.
# build/web also holds the converter of tools/export.py. Nothing of it is in the repository. Quick when nothing changed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
web=$root/build/web
viewer=$root/build/viewer

fail() {
  printf 'The viewer cannot be built: %s\n' "$*" >&2
  exit 1
}

[ $# -eq 0 ] || {
  printf 'usage: bash tools/build_viewer.sh\n' >&2
  exit 2
}
command -v node >/dev/null && command -v npm >/dev/null ||
  fail "node and npm are needed (version 20 or newer). On Debian and Ubuntu: apt-get install nodejs npm"

mkdir -p "$web"
if command -v flock >/dev/null; then
  exec 9>"$web/.lock"
  flock 9 # another one may be running
fi
if ! cmp -s "$root/web/package-lock.json" "$web/installed.lock"; then
  echo "Installing the packages of web/package-lock.json into $web (about 250 MB) ..." >&2
  rm -f "$web/installed.lock"
  cp "$root/web/package.json" "$root/web/package-lock.json" "$web/"
  # The packages bring what they need ready-made: none of their scripts has to run.
  npm ci --ignore-scripts --no-audit --no-fund --loglevel=error --prefix "$web" >&2 ||
    fail "npm could not install; its message is above. Is there a network connection? Then run the same command again."
  cp "$root/web/package-lock.json" "$web/installed.lock"
fi

modules=$web/node_modules
next=$root/build/viewer.partial
rm -rf "$next"
mkdir -p "$next/vendor"
cp "$root/web/view.html" "$root/web/"*.js "$next/"
cp "$modules/three/build/three.module.js" "$modules/three/build/three.core.js" "$next/vendor/"
for addon in controls/OrbitControls.js postprocessing/Pass.js; do
  install -D -m 644 "$modules/three/examples/jsm/$addon" "$next/vendor/addons/$addon"
done
cp "$modules/@sparkjsdev/spark/dist/spark.module.min.js" "$next/vendor/spark.module.js"
cp "$modules/fzstd/esm/index.mjs" "$next/vendor/fzstd.js"
for package in three @sparkjsdev/spark fzstd; do
  cp "$modules/$package/LICENSE" "$next/vendor/LICENSE.${package##*/}"
done
rm -rf "$viewer"
mv "$next" "$viewer"
echo "$viewer"
