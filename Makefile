# make demo      hear what hints do: the sample mixture, alone, boosted and large, into out/demo-ss/ and out/demo-tse/
# make test      all tests
# make lint      ruff and mypy
# make lint-deploy   the files of deploy/, with what tools are here
# make results   the validation table of the shipped bundles, into out/results/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test lint lint-deploy results validation stubs clean

demo: $(VENV)/.runtime
	mkdir -p out/demo-ss out/demo-tse
	$(BIN)/kb-client replay samples/mixture.wav --output out/separated.wav --delay-ms 48 \
		--reference samples/source1.wav --reference samples/source2.wav --alone ss-alone --with-large \
		--compare out/demo-ss --report out/demo-ss/report.json --plot out/demo-ss/hints.png
	$(BIN)/kb-client replay samples/mixture.wav --bundle tse-48ms-compact --enrollment samples/enrollment.npy \
		--output out/extracted.wav --delay-ms 48 --reference samples/source1.wav --alone tse-alone --with-large \
		--compare out/demo-tse --report out/demo-tse/report.json --plot out/demo-tse/hints.png

# The same mixtures on every machine: voices, rooms and seed are fixed.
VALIDATION := $(BIN)/kb-make-dataset --speech samples/speech/valid --sofa samples/hrtf/mit_kemar_normal_pinna.sofa \
	--absorption 0.3 0.8 --anechoic 0.25 --seed 2026 --val 200

validation: $(VENV)/.development
	$(VALIDATION) --task ss --output data/valid-ss
	$(VALIDATION) --task tse --output data/valid-tse

results: validation
	$(BIN)/kb-evaluate ss-alone ss-48ms-compact --data data/valid-ss --split val --metrics si_sdri,snri --output out/results/ss
	$(BIN)/kb-evaluate tse-alone tse-48ms-compact --data data/valid-tse --split val --metrics si_sdri,snri \
		--output out/results/tse

test: $(VENV)/.development
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lint-deploy: $(VENV)/.development
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[deploy]"
	$(BIN)/python -m pytest tests/deploy

stubs: $(VENV)/.development
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[client,server]"
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[client,server,enroll,train,dev]"
	touch $@
