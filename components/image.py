"""The one place that names the image the steps run in."""

PIPELINE_IMAGE = "evergreen-pipeline-python:0.1.0"
"""Built from images/pipeline. KFP's cache key holds this name, not the library's code: new code needs a new tag."""
