"""The Prefect side: when the stages of dvc.yaml run, and how a person sees it. DVC alone judges what is stale."""
