# One line a target; the work is in scripts/, and each script has --help.
# ARGS goes to the script: make test ARGS='-run TestWire'

.DEFAULT_GOAL := help
.PHONY: help build test lint demo demo-capture demo-mesh log bench conformance clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# From inside each folder and naming the one file, as a person types it.
build: ## build both programs, static, each in its folder
	@scripts/need go
	cd cni-emulator && CGO_ENABLED=0 go build -o cni-emulator cni-emulator.go
	cd ztunnel-emulator && CGO_ENABLED=0 go build -o ztunnel-emulator ztunnel-emulator.go

test: ## run all tests with the race detector, each package in a private world
	@scripts/test $(ARGS)

lint: ## check format, go vet, staticcheck, go.mod, shell scripts, the systemd unit
	@scripts/lint $(ARGS)

demo: build ## show the handoff on real namespaces
	@scripts/demo $(ARGS)

demo-capture: build ## show a pod's traffic going through ztunnel, from curl to the server
	@scripts/demo-capture $(ARGS)

demo-mesh: build ## show pods in mutual TLS, with identities, a service and a policy
	@scripts/demo-mesh $(ARGS)

log: build ## write LOG.md anew (ARGS=--check compares only)
	@scripts/log $(ARGS)

bench: ## measure the handoff over 1,000 namespaces, what is relayed, and the mesh
	@scripts/bench/run $(ARGS)

# Never on a live node: scripts/conformance -h says why.
conformance: ## hold a ZDS half to the protocol: ZDS=client:PATH or ZDS=server:PATH
	@scripts/conformance $(ZDS) $(ARGS)

clean: ## remove the two programs
	rm -f cni-emulator/cni-emulator ztunnel-emulator/ztunnel-emulator
