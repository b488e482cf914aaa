"""A small web server for one folder of levels and for the page that shows them.

    /                     the page (build/viewer, made by tools/build_viewer.sh) and its scripts
    /layers/levels.json   and every file that it names; nothing else of the folder
    /cameras.json         cameras to look through, where they are known

Files come with their SHA-256 as ETag, so an interrupted download goes on only in the same file (Range with If-Range), and one that is
known is not sent again (304). Under `?sha256=<its hash>` a file can never change and may be kept for good; without, caches ask each time.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2d.cameras import Cameras
from s2d.layers.manifest import MANIFEST, layers_folder, load_levels, parse_levels
from s2d.log import logger

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

VIEWER_DIR = Path(__file__).resolve().parents[2] / "build" / "viewer"
LOOPBACK = ("127.0.0.1", "localhost")
FOREVER = "public, max-age=31536000, immutable"
ASK_EACH_TIME = "no-cache"
# Nothing but its own scripts: what is shown came with the page, and it talks to this server alone.
CONTENT_POLICY = (
    "default-src 'self' blob: data:; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' blob: data:"
)
NO_VIEWER = (
    "The page is not built: bash tools/build_viewer.sh. The layers are at /layers/levels.json.\n"
)


def build_app(
    folder: Path,
    cameras: Cameras | None = None,
    allowed_hosts: Sequence[str] = ("*",),
    viewer_dir: Path = VIEWER_DIR,
) -> "Starlette":
    """Make the ASGI application.

    Args:
        folder: With levels.json. It may be replaced while the server runs.
        cameras: Given out as /cameras.json.
        allowed_hosts: Names under which requests may come.
        viewer_dir: Of the built page; may be missing.

    Raises:
        FileNotFoundError, ValueError: No levels in the folder, or damaged ones; starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import FileResponse, PlainTextResponse, Response
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise _not_installed(error) from error
    load_levels(folder)

    async def layers(request: "Request") -> "Response":
        name = request.path_params["name"]
        manifest = (folder / MANIFEST).read_bytes()
        files = parse_levels(manifest, folder).files
        if name == MANIFEST:
            digest = hashlib.sha256(manifest).hexdigest()
        elif name in files and (folder / name).is_file():
            digest = files[name].sha256
        else:
            return PlainTextResponse(f"{name} is no file of these layers.\n", status_code=404)
        cache = FOREVER if request.query_params.get("sha256") == digest else ASK_EACH_TIME
        headers = {"ETag": f'"{digest}"', "Cache-Control": cache}
        if headers["ETag"] in _listed(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        if name == MANIFEST:
            return Response(manifest, headers=headers, media_type="application/json")
        return FileResponse(folder / name, headers=headers, media_type="application/octet-stream")

    async def camera_list(request: "Request") -> "Response":
        if cameras is None:
            return PlainTextResponse("No cameras are known.\n", status_code=404)
        headers = {"Cache-Control": ASK_EACH_TIME}
        return Response(cameras.to_json(), headers=headers, media_type="application/json")

    class Page(StaticFiles):
        def file_response(self, *arguments, **options) -> "Response":
            response = super().file_response(*arguments, **options)
            response.headers["Cache-Control"] = ASK_EACH_TIME
            response.headers["Content-Security-Policy"] = CONTENT_POLICY
            return response

    async def no_page(request: "Request") -> "Response":
        return PlainTextResponse(NO_VIEWER, status_code=404)

    has_page = (viewer_dir / "view.html").is_file()
    routes = [Route("/layers/{name}", layers), Route("/cameras.json", camera_list)]
    if has_page:
        # One page: "/" is view.html.
        async def page(request: "Request") -> "Response":
            headers = {"Cache-Control": ASK_EACH_TIME, "Content-Security-Policy": CONTENT_POLICY}
            return FileResponse(viewer_dir / "view.html", headers=headers)

        routes += [Route("/", page), Mount("/", Page(directory=viewer_dir))]
    else:
        routes += [Route("/", no_page)]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


def serve(source: Path, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve the layers of a run until Ctrl-C.

    Args:
        source: OUT of a run, or a folder with levels.json.
        host: Address to listen on; with the default only this machine can connect (over SSH: ssh -L 8080:127.0.0.1:8080 …).
        port: 1 to 65535; 0 takes a free one.

    Raises:
        FileNotFoundError, ValueError: As `build_app`; the port is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _not_installed(error) from error
    folder = layers_folder(source)
    # A page elsewhere must not reach this server through a name that it points here (DNS rebinding).
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    app = build_app(folder, find_cameras(folder), hosts)
    config = uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False)
    try:
        listening = config.bind_socket()
    except SystemExit as error:  # uvicorn's way to say it
        raise ValueError(
            f"Cannot listen on {host}:{port}: the port is taken or the address is not this machine's. Give another --port, or 0."
        ) from error
    logger.info("%s: http://%s:%d/ (Ctrl-C ends it)", folder, host, listening.getsockname()[1])
    if host not in LOOPBACK:
        logger.warning("Anyone who reaches %s can see these layers.", host)
    uvicorn.Server(config).run(sockets=[listening])


def find_cameras(folder: Path) -> Cameras | None:
    """The kept cameras of the run that a folder of layers (OUT/stage3/layers) belongs to."""
    path = Path(folder).parent / "kept_cameras.json"
    return Cameras.from_json(path) if path.is_file() else None


def _listed(header: str) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}


def _not_installed(error: ImportError) -> ValueError:
    return ValueError(
        f"Serving needs starlette and uvicorn ({error}). Run: bash tools/setup_env.sh, or pip install starlette uvicorn."
    )
