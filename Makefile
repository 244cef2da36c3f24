# make demo      hear what hints do: the sample mixture, alone, boosted and large, into out/demo-ss/ and out/demo-tse/
# make test      all tests
# make lint      ruff and mypy
# make lint-deploy   the files of deploy/, with what tools are here
# make results   the tables of docs/results.md, into out/results/; RUNS names runs for separation that are measured too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test lint lint-deploy results validation stubs clean

demo: $(VENV)/.runtime
	mkdir -p out/demo-ss out/demo-tse
	$(BIN)/kb-client replay samples/mixture.flac --output out/separated.wav --delay-ms 48 \
		--reference samples/source1.flac --reference samples/source2.flac --alone ss-alone --with-large \
		--page out/demo-ss/page.html --compare out/demo-ss --report out/demo-ss/report.json --plot out/demo-ss/hints.png
	$(BIN)/kb-client replay samples/mixture.flac --bundle tse-48ms-compact --enrollment samples/enrollment.npy \
		--output out/extracted.wav --delay-ms 48 --reference samples/source1.flac --alone tse-alone --with-large \
		--page out/demo-tse/page.html --compare out/demo-tse --report out/demo-tse/report.json --plot out/demo-tse/hints.png

# The same mixtures on every machine: voices, rooms and seed are fixed. Two sets of speakers whom nobody was trained on,
# heard by a dummy head, two people's heads, two bare microphones and one.
VALIDATION := $(BIN)/kb-make-dataset --seed 2026 --anechoic 0.25 --absorption 0.2 0.8 --val 240 \
	--sofa samples/hrtf/mit_kemar_normal_pinna.sofa --sofa samples/hrtf/cipic_059.sofa --sofa samples/hrtf/cipic_135.sofa \
	--microphones 0.25 --mono 0.25 --unequal 0.15
# For a pair that uses hints on arrival: hints that are 8, 16, 24, 48, 96 and 200 ms old, then jitter and losses.
ARRIVAL := --delays 1,2,3,6,12,25 --networks delay=20+jitter=10,delay=20+jitter=20,delay=20+jitter=30,$\
	delay=20+loss=0.01,delay=20+loss=0.05,delay=20+loss=0.1,delay=20+jitter=30+loss=0.05,wifi,5g,lte,satellite

validation: $(VENV)/.development
	for task in ss tse; do \
		$(VALIDATION) --speech samples/speech/valid --task $$task --output data/listeners-$$task && \
		$(VALIDATION) --speech samples/speech/valid-more --task $$task --output data/listeners-more-$$task || exit; \
	done

# Two sets at a time: one thread computes a small network about as fast as two.
results: validation
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 measure-listeners-ss measure-listeners-more-ss measure-listeners-tse measure-listeners-more-tse
	$(BIN)/python -m benchmarks.quality_by_delay out/results/listeners-ss out/results/listeners-more-ss \
		--titles "five speakers" "38 speakers" --output out/results/quality-by-delay.png

measure-%-ss: MODELS = ss-alone ss-compact $(RUNS) $(ARRIVAL)
measure-%-tse: MODELS = tse-alone tse-48ms-compact
measure-%:
	$(BIN)/kb-evaluate $(MODELS) --data data/$* --split val --metrics si_sdri,snri --output out/results/$*
	$(BIN)/python -m benchmarks.conditions out/results/$* data/$*/val --json out/results/$*/conditions.json

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
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m knowledge_boosting.protos.generate

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes, 0.5 GB to download with torch's CPU build, 3 GB with the one for CUDA"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[client,server]"
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo "Installing what training and tests need: some minutes, 0.4 GB more to download"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[client,server,enroll,train,dev]"
	touch $@
