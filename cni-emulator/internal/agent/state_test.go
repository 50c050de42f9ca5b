package agent

import (
	"bytes"
	"errors"
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

// A file with anything wrong is moved aside, whole, and said so.
func TestDamagedState(t *testing.T) {
	good, err := encodeState(memory{BootID: "b", Pods: []record{{PodID: at("web", "/run/netns/web"), Cookie: 7}}})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := decodeState(good); err != nil || len(m.Pods) != 1 {
		t.Fatal(m, err)
	}
	change := func(old, new string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("no %s in %s", old, good)
		}
		return bytes.Replace(good, []byte(old), []byte(new), 1)
	}
	damaged := map[string][]byte{
		"empty":      {},
		"zeros":      make([]byte, 4096),
		"cut":        good[:len(good)/2],
		"one letter": change("netns/web", "netns/wob"),
		"version":    change(`"version":1`, `"version":2`),
		"more":       append(bytes.Clone(good), "{}"...),
		"field":      change(`{"version"`, `{"extra":1,"version"`),
		"no JSON":    []byte("precious\n"),
		"two the same": func() []byte {
			r := record{PodID: named("web")}
			b, _ := encodeState(memory{Pods: []record{r, r}})
			return b
		}(),
		"nameless": func() []byte { b, _ := encodeState(memory{Pods: []record{{}}}); return b }(),
	}
	for name, b := range damaged {
		t.Run(name, func(t *testing.T) {
			cfg := restarting(t)
			if err := os.WriteFile(cfg.State, b, 0o600); err != nil {
				t.Fatal(err)
			}
			n := startWith(t, cfg, nil)
			if !strings.Contains(n.log.String(), "is not what an agent wrote") {
				t.Error("the log does not say it")
			}
			aside, err := filepath.Glob(cfg.State + ".damaged-*")
			if err != nil || len(aside) != 1 {
				t.Fatalf("moved to %v, %v", aside, err)
			}
			if got := read(t, aside[0]); !bytes.Equal(got, b) {
				t.Error("what was moved aside is not what was there")
			}
			n.stop()
			if _, aside, err := readState(cfg.State); aside != nil || err != nil {
				t.Errorf("the new one: %v, %v", aside, err)
			}
		})
	}
}

// Wherever a write is cut off, the old file or the new one is there, whole.
func TestCrashDuringWrite(t *testing.T) {
	before := memory{Pods: []record{{PodID: named("old")}}}
	after := memory{Pods: []record{{PodID: named("new")}}}
	whole, err := encodeState(after)
	if err != nil {
		t.Fatal(err)
	}
	for cut := 0; cut <= len(whole); cut += 16 {
		path := filepath.Join(t.TempDir(), "state.json")
		if err := writeState(path, before); err != nil {
			t.Fatal(err)
		}
		// A crash during the write, or before the rename.
		if err := os.WriteFile(path+".new", whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if m, aside, err := readState(path); err != nil || aside != nil || m.Pods[0].Name != "old" {
			t.Fatalf("cut at %d: %v, %v, %v", cut, m, aside, err)
		}
		// The next write is not disturbed by what lies there.
		if err := writeState(path, after); err != nil {
			t.Fatal(err)
		}
		if m, aside, err := readState(path); err != nil || aside != nil || m.Pods[0].Name != "new" {
			t.Fatalf("after a cut at %d: %v, %v, %v", cut, m, aside, err)
		}
	}
}

// What is not the agent's is left alone.
func TestStateOfStrangers(t *testing.T) {
	cfg := restarting(t)
	cfg.State = t.TempDir() // a directory
	if a, err := New(cfg); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("New: %v, %v", a, err)
	}
	if err := unix.Mkfifo(cfg.State+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.State += "/fifo"
	if a, err := New(cfg); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("New: %v, %v", a, err)
	}
	// The sockets are gone again.
	for _, path := range []string{cfg.ZDS, cfg.Control} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// A verb hears that what it did will not be remembered.
func TestStateCanNotBeWritten(t *testing.T) {
	cfg := restarting(t)
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg.State = filepath.Join(dir, "state.json")
	n := startWith(t, cfg, nil)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	web := netnstest.New(t)
	if _, err := n.add(named("web"), web, 0); err == nil || !strings.Contains(err.Error(), "not written down") {
		t.Errorf("add: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.add(named("web"), web, 0); err != nil {
		t.Errorf("add: %v", err)
	}
}

// Whatever a verb called done is on disk, however many there are at once.
func TestDoneIsOnDisk(t *testing.T) {
	cfg := restarting(t)
	n := startWith(t, cfg, nil)
	const pods = 200
	errs := make(chan error)
	for i := range pods {
		ns := netnstest.NewLoDown(t)
		go func() {
			_, err := n.add(named("pod-"+string(rune('a'+i%26))+string(rune('a'+i/26))), ns, 0)
			errs <- err
		}()
	}
	for range pods {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	m, aside, err := readState(cfg.State)
	if err != nil || aside != nil || len(m.Pods) != pods {
		t.Errorf("%d pods in the file, %v, %v", len(m.Pods), aside, err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
