"""The engine: a child process that runs the model, and the daemon's side of it.

`host` is what the daemon imports. Everything that touches onnxruntime-genai is imported by the
child process only (`python -m edged.engine.worker`).
"""
