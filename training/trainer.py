"""``python -m knowledge_boosting.training.trainer``: ``kb-train`` by the name that the published trainer has."""

from knowledge_boosting.training.commands.train import main

if __name__ == "__main__":
    main()
