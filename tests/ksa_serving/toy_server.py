"""A whole service of the toy model in a process without torch: `toy_server.py STATE_DIR PORT ADMIN_PORT`."""

import sys
from pathlib import Path

from ksa_serving.app import create_app
from ksa_serving.command import listen, open_store
from ksa_serving.event_log import EventLog
from ksa_serving.server import ReadyServer, server_config
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release


def main(state_dir: Path, port: int, admin_port: int) -> None:
    state_dir.mkdir(parents=True, exist_ok=True)
    release = toy_release()
    settings = ServeSettings(state_bytes=200_000, spill_events=20, cold_bytes=10**8)
    log = EventLog(state_dir, release.tie)
    models = {release.state_fingerprint: release.model}
    service = Service(release, log, open_store("lmdb", state_dir, models, log, settings), settings, models=models)
    listeners = [listen("127.0.0.1", port), listen("127.0.0.1", admin_port)]
    app = create_app(service, admin_port=listeners[1].getsockname()[1])
    ready = f"ready: http://127.0.0.1:{listeners[0].getsockname()[1]}"
    ReadyServer(server_config(app, service), service, ready).run(sockets=listeners)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
