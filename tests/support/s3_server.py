"""A server that speaks S3's protocol, for a process of its own; its storage is moto's."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Serve on a free port of the loopback, and say which on stdout; end when stdin does."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").disabled = True
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    print(server.server_port, flush=True)
    import threading

    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
