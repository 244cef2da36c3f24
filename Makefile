# make demo      hear what hints do: the sample mixture, alone, boosted and large, into out/demo-ss/ and out/demo-tse/
# make test      all tests
# make lint      ruff and mypy
# make lint-deploy   the files of deploy/, with what tools are here
# make results   the validation table of the shipped bundles, into out/results/
# make results-by-listener   the same for heads, microphones and mono, and for forty more speakers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test lint lint-deploy results results-by-listener validation stubs clean

demo: $(VENV)/.runtime
	mkdir -p out/demo-ss out/demo-tse
	$(BIN)/kb-client replay samples/mixture.flac --output out/separated.wav --delay-ms 48 \
		--reference samples/source1.flac --reference samples/source2.flac --alone ss-alone --with-large \
		--page out/demo-ss/page.html --compare out/demo-ss --report out/demo-ss/report.json --plot out/demo-ss/hints.png
	$(BIN)/kb-client replay samples/mixture.flac --bundle tse-48ms-compact --enrollment samples/enrollment.npy \
		--output out/extracted.wav --delay-ms 48 --reference samples/source1.flac --alone tse-alone --with-large \
		--page out/demo-tse/page.html --compare out/demo-tse --report out/demo-tse/report.json --plot out/demo-tse/hints.png

# The same mixtures on every machine: voices, rooms and seed are fixed.
VALIDATION := $(BIN)/kb-make-dataset --seed 2026 --anechoic 0.25 --sofa samples/hrtf/mit_kemar_normal_pinna.sofa
# Two sets of speakers whom nobody was trained on, heard by a dummy head, two people's heads, two bare microphones and one.
LISTENERS := $(VALIDATION) --sofa samples/hrtf/cipic_059.sofa --sofa samples/hrtf/cipic_135.sofa \
	--microphones 0.25 --mono 0.25 --unequal 0.15 --absorption 0.2 0.8 --val 240

validation: $(VENV)/.development
	for task in ss tse; do \
		$(VALIDATION) --absorption 0.3 0.8 --val 200 --speech samples/speech/valid --task $$task --output data/valid-$$task && \
		$(LISTENERS) --speech samples/speech/valid --task $$task --output data/listeners-$$task && \
		$(LISTENERS) --speech samples/speech/valid-more --task $$task --output data/listeners-more-$$task || exit; \
	done

results: validation
	for task in ss tse; do \
		$(BIN)/kb-evaluate $$task-alone $$task-48ms-compact --data data/valid-$$task --split val --metrics si_sdri,snri \
			--output out/results/$$task || exit; \
	done

results-by-listener: validation
	for set in listeners-ss listeners-more-ss listeners-tse listeners-more-tse; do \
		task=$${set##*-}; \
		$(BIN)/kb-evaluate $$task-alone $$task-48ms-compact --data data/$$set --split val --metrics si_sdri \
			--output out/results/$$set && \
		$(BIN)/python -m benchmarks.conditions out/results/$$set data/$$set/val --json out/results/$$set/conditions.json \
			|| exit; \
	done

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
