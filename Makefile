# make build    programs and completion, to bin/
# make install  to DESTDIR (default: none) under prefix (/usr)
# make deb      dist/*_VERSION_amd64.deb: virt-trust, virt-trust-cli, virt-trust-verifier
# make lint-deb what lintian says of them
# make test     everything, test hosts included; as root
# make check    the fast part of it, as anyone
# make demo     a guarded VM on a private test host, and an attack on it
# make bench    guarded against plain libvirt, as ratios
# make bench-verifier  the Verifier's appraisal against its bare hashes, its database, its page, a fleet of NODES (10000)
# make faults   kills, power cuts, broken disks and TPMs at every step: figures
# make soak     EVENTS (2000) random events in the lives of six VMs, for SOAK (24h) at most
# make fuzz     every fuzzer for FUZZTIME (10m)
# make clean

VERSION := $(shell sed -n '1s/.*(\(.*\)).*/\1/p' packaging/changelog)
# Dates in packages are the changelog's, so that a build can be repeated.
export SOURCE_DATE_EPOCH := $(shell date -u +%s -d "$$(sed -n 's/^ -- .*>  //p' packaging/changelog | head -n1)")
export CGO_ENABLED := 0

DESTDIR ?=
# The programs know each other by their paths under /usr: an installation that
# runs has this prefix.
prefix ?= /usr
bindir = $(prefix)/bin
sbindir = $(prefix)/sbin
libexecdir = $(prefix)/libexec/virt-trust
datadir = $(prefix)/share
unitdir = $(prefix)/lib/systemd/system
sysconfdir = /etc
FUZZTIME ?= 10m
SOAK ?= 24h
EVENTS ?= 2000
NODES ?= 10000

GO ?= go
GOFLAGS_BUILD = -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'

# program:its main package; virt-trust makes its own completion
MAINS = virt-trust:helper/virt-trust virt-trustd:helper/virt-trustd virt-trust-hook:hooks/qemu virt-trust-wrapper:wrapper virt-trust-emulator:wrapper/emulator \
	virt-trust-ekcert:helper/virt-trust-ekcert virt-trust-inject:helper/virt-trust-inject virt-trust-agent:helper/virt-trust-agent \
	virt-trust-verifier:helper/virt-trust-verifier virt-trust-signer:helper/virt-trust-verifier/signer
LIBEXEC = virt-trustd virt-trust-hook virt-trust-wrapper virt-trust-emulator virt-trust-ekcert virt-trust-inject virt-trust-agent
LIBEXEC_VERIFIER = virt-trust-verifier virt-trust-signer
# as package emulator has them: the names, and the descriptor
EMULATORS = qemu-system-aarch64 qemu-system-ppc64 qemu-system-x86_64
EMULATOR_FD = 777
MAN_CLI = packaging/man/virt-trust.1 packaging/man/virt-trust-reasons.7
MAN_VERIFIER = $(wildcard packaging/man/virt-trust-verifier*.[1-8] packaging/man/virt-trust-signer.8)
MAN_HOST = $(filter-out $(MAN_CLI) $(MAN_VERIFIER),$(wildcard packaging/man/*.[1-8]))

.PHONY: build install install-cli install-host install-verifier deb lint-deb test check faults demo bench bench-verifier soak fuzz clean help

help:
	@sed -n 's/^# make/make/p' Makefile

build:
	@mkdir -p bin
	@set -e; for m in $(MAINS); do \
		echo "go build $${m%%:*}"; $(GO) build $(GOFLAGS_BUILD) -o bin/$${m%%:*} ./$${m#*:}; \
	done
	bin/virt-trust completion bash > bin/virt-trust.bash

INSTALL = install -D -p -m 644
INSTALL_PROGRAM = install -D -p -m 755

install: install-cli install-host install-verifier

# The three packages.
install-cli: build
	$(INSTALL_PROGRAM) bin/virt-trust $(DESTDIR)$(bindir)/virt-trust
	$(INSTALL) bin/virt-trust.bash $(DESTDIR)$(datadir)/bash-completion/completions/virt-trust
	$(INSTALL) internal/evidence/report/evidence.cddl $(DESTDIR)$(datadir)/doc/virt-trust-cli/evidence.cddl
	@set -e; for m in $(MAN_CLI); do $(INSTALL) $$m $(DESTDIR)$(datadir)/man/man$${m##*.}/$${m##*/}; done

install-host: build
	@set -e; for p in $(LIBEXEC); do $(INSTALL_PROGRAM) bin/$$p $(DESTDIR)$(libexecdir)/$$p; done
	install -d $(DESTDIR)$(libexecdir)/bin
	ln -sf ../virt-trust-wrapper $(DESTDIR)$(libexecdir)/bin/swtpm
	ln -sf ../virt-trust-wrapper $(DESTDIR)$(libexecdir)/bin/swtpm_setup
	install -d $(DESTDIR)$(libexecdir)/emulator/open
	@set -e; for e in $(EMULATORS); do \
		ln -sf ../virt-trust-emulator $(DESTDIR)$(libexecdir)/emulator/$$e; \
		ln -sf /proc/self/fd/$(EMULATOR_FD) $(DESTDIR)$(libexecdir)/emulator/open/$$e; \
	done
	install -d $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d
	ln -sf $(libexecdir)/virt-trust-hook $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d/50-virt-trust
	$(INSTALL) packaging/virt-trustd.toml $(DESTDIR)$(sysconfdir)/virt-trust/virt-trustd.toml
	$(INSTALL) packaging/apparmor/virt-trust $(DESTDIR)$(sysconfdir)/apparmor.d/virt-trust
	$(INSTALL) packaging/apparmor/virt-trust-libvirtd $(DESTDIR)$(sysconfdir)/apparmor.d/abstractions/virt-trust-libvirtd
	$(INSTALL) packaging/apparmor/virt-trust-libvirt-qemu $(DESTDIR)$(sysconfdir)/apparmor.d/abstractions/virt-trust-libvirt-qemu
	$(INSTALL) systemd/virt-trustd.service $(DESTDIR)$(unitdir)/virt-trustd.service
	$(INSTALL) systemd/50-virt-trust.conf $(DESTDIR)$(unitdir)/libvirtd.service.d/50-virt-trust.conf
	$(INSTALL) systemd/50-virt-trust.conf $(DESTDIR)$(unitdir)/virtqemud.service.d/50-virt-trust.conf
	$(INSTALL) packaging/agent.toml $(DESTDIR)$(sysconfdir)/virt-trust/agent.toml
	$(INSTALL) systemd/virt-trust-agent.service $(DESTDIR)$(unitdir)/virt-trust-agent.service
	$(INSTALL) packaging/virt-trust-agent.sysusers $(DESTDIR)$(prefix)/lib/sysusers.d/virt-trust-agent.conf
	$(INSTALL) dbus/org.virttrust1.Agent.conf $(DESTDIR)$(datadir)/dbus-1/system.d/org.virttrust1.Agent.conf
	$(INSTALL) dbus/org.virttrust1.Agent.service $(DESTDIR)$(datadir)/dbus-1/system-services/org.virttrust1.Agent.service
	$(INSTALL) dbus/org.virttrust1.Agent.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.virttrust1.Agent.xml
	$(INSTALL) packaging/virt-trust.sysusers $(DESTDIR)$(prefix)/lib/sysusers.d/virt-trust.conf
	$(INSTALL) packaging/virt-trust.tmpfiles $(DESTDIR)$(prefix)/lib/tmpfiles.d/virt-trust.conf
	$(INSTALL) packaging/virt-trust.catalog $(DESTDIR)$(prefix)/lib/systemd/catalog/virt-trust.catalog
	$(INSTALL) dbus/org.virttrust1.conf $(DESTDIR)$(datadir)/dbus-1/system.d/org.virttrust1.conf
	$(INSTALL) dbus/org.virttrust1.service $(DESTDIR)$(datadir)/dbus-1/system-services/org.virttrust1.service
	$(INSTALL) dbus/org.virttrust1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.virttrust1.xml
	$(INSTALL) packaging/org.virttrust1.policy $(DESTDIR)$(datadir)/polkit-1/actions/org.virttrust1.policy
	@set -e; for m in $(MAN_HOST); do $(INSTALL) $$m $(DESTDIR)$(datadir)/man/man$${m##*.}/$${m##*/}; done

install-verifier: build
	@set -e; for p in $(LIBEXEC_VERIFIER); do \
		$(INSTALL_PROGRAM) bin/$$p $(DESTDIR)$(libexecdir)/$$p; \
		install -d $(DESTDIR)$(sbindir); ln -sf ../libexec/virt-trust/$$p $(DESTDIR)$(sbindir)/$$p; \
	done
	$(INSTALL) packaging/verifier.toml $(DESTDIR)$(sysconfdir)/virt-trust/verifier.toml
	@set -e; for u in virt-trust-verifier.service virt-trust-verifier.socket virt-trust-verifier-browsers.socket virt-trust-signer.service virt-trust-signer.socket; do \
		$(INSTALL) systemd/$$u $(DESTDIR)$(unitdir)/$$u; \
	done
	$(INSTALL) packaging/virt-trust-verifier.sysusers $(DESTDIR)$(prefix)/lib/sysusers.d/virt-trust-verifier.conf
	$(INSTALL) packaging/virt-trust-verifier.tmpfiles $(DESTDIR)$(prefix)/lib/tmpfiles.d/virt-trust-verifier.conf
	@set -e; for f in prometheus/virt-trust-alerts.yml prometheus/virt-trust-alerts.test.yml grafana/virt-trust.json; do \
		$(INSTALL) packaging/$$f $(DESTDIR)$(datadir)/doc/virt-trust-verifier/examples/$${f##*/}; \
	done
	@set -e; for m in $(MAN_VERIFIER); do $(INSTALL) $$m $(DESTDIR)$(datadir)/man/man$${m##*.}/$${m##*/}; done

deb: build
	packaging/debian/build

lint-deb: deb
	lintian --fail-on error dist/*_$(VERSION)_amd64.deb

check:
	@unformatted=$$(gofmt -l helper hooks internal wrapper); [ -z "$$unformatted" ] || { echo "gofmt wants: $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) test $$($(GO) list ./... | grep -v /internal/lab$$)

test:
	@[ "$$(id -u)" = 0 ] || { echo "make test boots test hosts, so it needs root; make check does not" >&2; exit 1; }
	internal/lab/install-packages.sh
	$(MAKE) check
	$(MAKE) faults
	$(MAKE) lint-deb
	VIRT_TRUST_LAB=1 $(GO) test -count=1 -timeout 50m ./internal/lab/...

faults:
	@mkdir -p bin
	@VIRT_TRUST_FAULTS=all $(GO) test -count=1 -v -run '^Test(World|KilledAt|Disk|Faults|PowerCutAt)' ./internal/vtpm/... ./internal/hosttpm ./internal/daemon >bin/faults.log 2>&1 || { cat bin/faults.log; exit 1; }
	@sed -n 's/.*figures: //p' bin/faults.log

demo: deb
	internal/lab/demo

bench: deb
	internal/lab/install-packages.sh
	$(GO) test -count=1 -run '^$$' -bench . ./internal/hook ./internal/vtpm/... ./internal/daemon
	$(GO) build -o bin/lab ./internal/lab/cmd/lab
	bin/lab bench

bench-verifier: build
	internal/lab/install-packages.sh
	$(GO) test -count=1 -run '^$$' -bench 'Appraise|Corpus' ./internal/appraise
	$(GO) test -count=1 -run '^$$' -bench 'Round' ./internal/verifier/store
	$(GO) test -count=1 -timeout 60m -run '^$$' -bench 'Fleet' ./internal/verifier/page
	$(GO) build -o bin/fleet ./internal/lab/cmd/fleet
	bin/fleet -nodes $(NODES)

soak: deb
	internal/lab/install-packages.sh
	VIRT_TRUST_LAB=1 VIRT_TRUST_SOAK=$(SOAK) VIRT_TRUST_EVENTS=$(EVENTS) $(GO) test -count=1 -timeout 24h -run '^(TestSoak|TestPowerCut)$$' -v ./internal/lab

# go test takes one fuzzer of one package at a time
fuzz:
	@set -e; grep -rl --include='*_test.go' '^func Fuzz' internal | sort | while read -r f; do \
		for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' $$f); do \
			echo "$$name in $${f%/*}"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) ./$${f%/*} </dev/null; \
		done; \
	done

clean:
	rm -rf bin dist
