"""The real ports: sockets, Uvicorn, vLLM, the watchdog, signals, the heartbeat."""
