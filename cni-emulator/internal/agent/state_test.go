package agent

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
)

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

// Whatever lies where the next state is prepared, a write neither waits for it,
// nor follows it, nor writes into it.
func TestStrangeFileInTheWay(t *testing.T) {
	for name, put := range map[string]func(fresh, other string) error{
		"fifo":         func(fresh, _ string) error { return unix.Mkfifo(fresh, 0o600) },
		"link":         func(fresh, other string) error { return os.Symlink(other, fresh) },
		"second name":  func(fresh, other string) error { return os.Link(other, fresh) },
		"unwritable":   func(fresh, _ string) error { return os.WriteFile(fresh, nil, 0o400) },
		"dangling":     func(fresh, other string) error { return os.Symlink(other+"x", fresh) },
		"too generous": func(fresh, _ string) error { return os.WriteFile(fresh, nil, 0o666) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.json")
			other := path + ".other"
			if err := errors.Join(os.WriteFile(other, []byte("precious"), 0o600), put(path+".new", other)); err != nil {
				t.Fatal(err)
			}
			if err := writeState(path, memory{}); err != nil {
				t.Fatal(err)
			}
			if _, aside, err := readState(path); aside != nil || err != nil {
				t.Error(aside, err)
			}
			if got := read(t, other); string(got) != "precious" {
				t.Errorf("another file has %q now", got)
			}
			if fi, err := os.Lstat(path); err != nil || fi.Mode() != 0o600 {
				t.Errorf("the state file is %v, %v", fi.Mode(), err)
			}
			if _, err := os.Lstat(other + "x"); err == nil {
				t.Error("it followed a link")
			}
		})
	}
	// A directory is somebody's.
	path := filepath.Join(t.TempDir(), "state.json")
	if err := os.Mkdir(path+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeState(path, memory{}); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a directory in the way: %v", err)
	}
}

// The file is replaced, never written into: who has the old one open has it whole.
func TestStateIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	if err := writeState(path, memory{BootID: "old"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := writeState(path, memory{BootID: "new"}); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(f)
	if m, decodeErr := decodeState(b); err != nil || decodeErr != nil || m.BootID != "old" {
		t.Errorf("the old file has %v, %v, %v", m, err, decodeErr)
	}
	if m, _, err := readState(path); err != nil || m.BootID != "new" {
		t.Errorf("the new one has %v, %v", m, err)
	}
}

// Another user's file would decide what we open.
func TestStateOfAnotherUser(t *testing.T) {
	if !testmain.RealRoot() {
		t.Skip("needs real root: another user has to own a file")
	}
	cfg := restarting(t)
	if err := errors.Join(writeState(cfg.State, memory{}), os.Chown(cfg.State, 65534, -1)); err != nil {
		t.Fatal(err)
	}
	before := read(t, cfg.State)
	if a, err := New(cfg); err == nil || !strings.Contains(err.Error(), "belongs to uid 65534, neither root nor this user") {
		t.Errorf("New: %v, %v", a, err)
	}
	if !bytes.Equal(read(t, cfg.State), before) {
		t.Error("it was not left alone")
	}
}

// A place where nothing can be written is told at the start.
func TestStateInNoPlace(t *testing.T) {
	cfg := restarting(t)
	cfg.State = filepath.Join(filepath.Dir(cfg.State), "missing", "state.json")
	cfg.Log = slog.New(slog.DiscardHandler)
	if a, err := New(cfg); err == nil || !strings.Contains(err.Error(), "write the state file: ") {
		t.Errorf("New: %v, %v", a, err)
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
