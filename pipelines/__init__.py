"""Pipelines: wiring only. Each compiles to the YAML that `kfp run create` takes and runs on a laptop by kfp.local."""
