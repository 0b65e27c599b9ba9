"""Run notebooks in a real JupyterLab, in a browser without a window: `python tests/lab.py [name …] [--shots DIR]`. Ends with one line that counts.

Slow (some seconds more than the notebook itself), so not part of `make test`, which runs every notebook with the same kernel. Needs Chromium."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600                                         # seconds a notebook


def browser():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    for o in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(o)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    driver = shutil.which("chromedriver")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver) if driver else None)


def server(folder: Path) -> tuple[subprocess.Popen, str]:
    "JupyterLab over a folder, with settings of its own; returns when it answers."
    import socket
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {f"JUPYTER_{k}_DIR": str(folder / ".lab" / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(folder / ".lab" / "ipython")}
    options = ("--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
            return process, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.5)
    process.kill()
    sys.exit("JupyterLab did not start")


def run(chrome, address: str, folder: Path, name: str, shots: str) -> str:
    "Restart the kernel and run all cells, save; what failed, or an empty text."
    path = folder / f"{name}.ipynb"
    n = sum(c["cell_type"] == "code" for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    chrome.get(f"{address}/lab/tree/{name}.ipynb?reset")
    command = "const app = window.jupyterapp; return app ? app.commands.hasCommand(arguments[0]) : false"
    for _ in range(120):
        if chrome.execute_script(command, "notebook:run-all-cells") and chrome.execute_script("return !!document.querySelector('.jp-Notebook .jp-Cell')"):
            break
        time.sleep(0.5)
    else:
        return "the notebook did not open"
    time.sleep(2)
    chrome.execute_script("""const app = window.jupyterapp, panel = app.shell.currentWidget;
        window.courseEnd = null;
        panel.sessionContext.ready.then(() => app.commands.execute('notebook:run-all-cells')).then(() => app.commands.execute('docmanager:save')).then(() => window.courseEnd = '', e => window.courseEnd = String(e));""")
    begin, failed = time.monotonic(), None
    while failed is None and time.monotonic() - begin < LIMIT:       # asked again and again: the driver gives up on one question after two minutes
        time.sleep(0.5)
        failed = chrome.execute_script("return window.courseEnd")
    if failed is None:
        return f"not at its end after {LIMIT} s"
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    errors = [f"cell {k}: {o['ename']}: {o['evalue'][:200]}" for k, c in enumerate(cells) for o in c["outputs"] if o["output_type"] == "error"]
    ran = sum(c["execution_count"] is not None for c in cells)
    if shots:
        chrome.execute_script("document.querySelector('.jp-WindowedPanel-outer')?.scrollTo(0, 0)")
        chrome.save_screenshot(str(Path(shots) / f"{name}.png"))
    return "; ".join(errors) or failed or ("" if ran == n else f"{ran} of {n} cells ran")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--shots", default="", help="folder for a screenshot of each")
    options = parser.parse_args()
    names = options.names or [p.stem for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        sys.path.insert(0, str(ROOT))
        from llm_course.course import copy_notebooks
        folder = Path(place)
        copy_notebooks(folder, outputs=False)
        process, address = server(folder)
        try:
            for name in names:
                begin = time.perf_counter()
                chrome = browser()
                try:
                    fault = run(chrome, address, folder, name, options.shots)
                finally:
                    chrome.quit()
                failed += bool(fault)
                print(f"{'FAILED' if fault else 'ok    '} {name}  {time.perf_counter() - begin:.0f} s  {fault}", flush=True)
        finally:
            process.terminate()
            process.wait(30)
    print(f"lab: {len(names) - failed} passed, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
