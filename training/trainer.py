"""Runs ``kb-train`` under the name of the published trainer: ``python -m knowledge_boosting.training.trainer``."""

from knowledge_boosting.training.commands.train import main

if __name__ == "__main__":
    main()
