# The two commands are `make demo` and `make test`; each does all the set-up it needs, once.
demo:  ## the same life behind every wall that the host offers
	@scripts/setup.sh demo
	@scripts/in-venv.sh python -m scripts.demo

test:  ## lint, types, the guest's tests, fuzzers (bounded), the test suite
	@scripts/setup.sh test
	@scripts/test.sh

lint:  ## formatting, lint, types, import layers
	@scripts/setup.sh python
	@scripts/lint.sh

bench:  ## every bench, into one table
	@scripts/setup.sh bench
	@scripts/in-venv.sh python -m scripts.bench

soak:  ## lives without end for SECONDS_OF_SOAK (default 600), looking for what is left over
	@scripts/setup.sh test
	@scripts/in-venv.sh python -m pytest -q -m soak
	@scripts/in-venv.sh python -m scripts.soak

fuzz:  ## the guest's fuzzers, FUZZ_SECONDS each (default 300)
	@scripts/setup.sh test
	@$(MAKE) -C guest --no-print-directory fuzz FUZZ_SECONDS=$${FUZZ_SECONDS:-300}

clean:  ## what set-up and builds made, the demo's home too
	@scripts/clean.sh

help:
	@sed -n 's/^\([a-z]*\):  ## /\1\t/p' Makefile

.PHONY: demo test lint bench soak fuzz clean help
.DEFAULT_GOAL := help
