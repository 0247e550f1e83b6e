"""``python -m selfkd``, which ``torchrun -m selfkd`` runs."""

from .cli import main

if __name__ == '__main__':
    main()
