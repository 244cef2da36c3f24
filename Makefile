# make demo   replay the sample mixture with hints over a simulated network, into out/
# make test   all tests
# make lint   ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE := out/untrained-ss-48ms

.PHONY: demo test lint stubs clean

demo: $(VENV)/.runtime
	rm -rf $(BUNDLE)
	$(BIN)/kb-export --untrained --seed 1 --config configs/demo/ss-48ms.json --output $(BUNDLE)
	$(BIN)/kb-client replay samples/mixture.wav --output out/untrained.wav --bundle $(BUNDLE) --delay-ms 48 \
		--reference samples/source1.wav --reference samples/source2.wav \
		--report out/report.json --plot out/replay.png

test: $(VENV)/.development
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

stubs: $(VENV)/.development
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[client,server]"
	mkdir -p out
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[client,server,enroll,train,dev]"
	touch $@
