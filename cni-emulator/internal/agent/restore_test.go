package agent

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

// nsFile makes a file that is a namespace, as ip-netns(8) does.
func nsFile(t *testing.T, path string, ns *netns.NS) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bind(t, path, ns)
}

func bind(t *testing.T, path string, ns *netns.NS) {
	t.Helper()
	// By a link that is the same in every thread: the test's own descriptor.
	if err := unix.Mount(fdPath(ns), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(os.NewSyscallError("mount", err))
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
}

func unbind(t *testing.T, path string) {
	t.Helper()
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(os.NewSyscallError("umount", err))
	}
}

// at is a pod with a remembered path.
func at(name, path string) control.PodID {
	id := named(name)
	id.Path = path
	return id
}

// restarting is an agent's configuration that the next agent can have again.
func restarting(t *testing.T) Config {
	dir := t.TempDir()
	return Config{ZDS: filepath.Join(dir, "zds.sock"), Control: filepath.Join(dir, "control.sock"), State: filepath.Join(dir, "state.json")}
}

// snapshot connects and returns what the snapshot says, and the peer.
func (n *node) snapshot() (map[string]bool, *peer) {
	n.t.Helper()
	p := n.dial()
	if err := p.conn.SendHello(); err != nil {
		n.t.Fatal(err)
	}
	said := make(map[string]bool)
	for {
		words := p.next()
		p.ack()
		if words == "snapshot_sent" {
			return said, p
		}
		said[words] = true
	}
}

func TestRestore(t *testing.T) {
	cfg := restarting(t)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	first := startWith(t, cfg, nil)
	spaces := make(map[string]*netns.NS)
	for _, name := range []string{"same", "gone", "another", "closed", "home", "twin"} {
		spaces[name] = netnstest.New(t)
		nsFile(t, path(name), spaces[name])
		if _, err := first.add(at(name, path(name)), spaces[name], 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := first.add(named("pathless"), netnstest.New(t), 0); err != nil {
		t.Fatal(err)
	}
	if err := first.del(named("nobody"), 0); err == nil {
		t.Error("deleted what is not there")
	}
	before := len(read(t, cfg.State))
	first.stop()
	if after := len(read(t, cfg.State)); after != before {
		t.Errorf("the state file had %d bytes when the last verb was done, %d at the end", before, after)
	}

	for _, name := range []string{"gone", "another", "closed", "home", "twin"} {
		unbind(t, path(name))
	}
	if err := os.Remove(path("gone")); err != nil {
		t.Fatal(err)
	}
	replacement := netnstest.New(t)
	bind(t, path("another"), replacement)
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	bind(t, path("home"), home)
	bind(t, path("twin"), spaces["same"])

	n := startWith(t, cfg, nil)
	said, z := n.snapshot()
	delete(said, `add uid="uid-twin"`) // one of the two is dropped
	delete(said, `add uid="uid-same"`)
	if want := map[string]bool{`add uid="uid-another"`: true, `keep uid="uid-closed"`: true}; !reflect.DeepEqual(said, want) {
		t.Errorf("snapshot: %v", said)
	}
	for i, want := range []string{`namespace=another`, `level=WARN msg="pod dropped" pod=default/gone`, `pod=default/home`, `pod=default/pathless`, ErrTaken.Error()} {
		if !strings.Contains(n.log.String(), want) {
			t.Errorf("%d: the log lacks %s", i, want)
		}
	}
	pods := n.list()
	if row := pods["another"]; row.Inode != replacement.ID().Ino {
		t.Errorf("another: %+v", row)
	}
	if row := pods["closed"]; row.Inode != 0 || !strings.Contains(row.LastError, "not a network namespace but a regular file") || row.Ztunnels[0].To != "keep" {
		t.Errorf("closed: %+v", row)
	}
	if len(pods) != 3 {
		t.Errorf("%d pods: %v", len(pods), pods)
	}
	// With its namespace it becomes a pod like any other.
	n.addNow(at("closed", path("closed")), spaces["closed"])
	z.expectAdd("closed", spaces["closed"])

	// And once more: what was kept survives, too.
	n.stop()
	n = startWith(t, cfg, nil)
	if got := n.list(); len(got) != 3 || got["closed"].Inode != 0 {
		t.Errorf("after the second restart: %v", got)
	}
}

// The same namespace is told from another one with its inode.
func TestRestoreTellsSameFromAnother(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*memory)
		want   string
	}{
		"same":            {func(*memory) {}, "namespace=same"},
		"another cookie":  {func(m *memory) { m.Pods[0].Cookie++ }, "namespace=another"},
		"another boot":    {func(m *memory) { m.BootID = "2c2e5fa2-0000-4000-8000-000000000000" }, "namespace=unknown"},
		"unknown cookie":  {func(m *memory) { m.Pods[0].Cookie = 0 }, "namespace=unknown"},
		"another process": {func(m *memory) { m.Pods[0].Cookie++; m.Pods[0].Path = "/proc/self/fd/" }, "the namespace of another process"},
		"a process, unknown": {
			func(m *memory) { m.Pods[0].Cookie = 0; m.Pods[0].Path = "/proc/self/fd/" },
			"nobody can tell",
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := restarting(t)
			path := filepath.Join(t.TempDir(), "web")
			web := netnstest.New(t)
			nsFile(t, path, web)
			first := startWith(t, cfg, nil)
			first.addNow(at("web", path), web)
			first.stop()
			m, aside, err := readState(cfg.State)
			if err != nil || aside != nil || m.Pods[0].Cookie == 0 {
				t.Fatal(m, aside, err)
			}
			tt.change(&m)
			if strings.HasSuffix(m.Pods[0].Path, "/") {
				m.Pods[0].Path = fdPath(web)
			}
			if err := writeState(cfg.State, m); err != nil {
				t.Fatal(err)
			}
			n := startWith(t, cfg, nil)
			n.await(tt.want)
		})
	}
}
