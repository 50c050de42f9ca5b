package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ambient-emulator/internal/testmain"
)

// logbook collects log lines.
type logbook struct{ testmain.Log }

func (l *logbook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// naming is a configuration whose only workload has that name.
func naming(name string) string {
	return "workloads:\n- {uid: u, name: " + name + ", namespace: demo, serviceAccount: sa, workloadIps: [], services: {}}\n"
}

// followed is a store that follows a file in a directory of its own.
type followed struct {
	t    *testing.T
	path string
	log  *logbook
	*Store
}

func follow(t *testing.T, path string) *followed {
	t.Helper()
	f := &followed{t: t, path: path, log: &logbook{}}
	var err error
	if f.Store, err = Open(path, "", f.log.logger()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

func followFile(t *testing.T) *followed {
	t.Helper()
	path := filepath.Join(t.TempDir(), "local.yaml")
	write(t, path, naming("one"))
	return follow(t, path)
}

// eventually asks until it is so.
func (f *followed) eventually(what string, is func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("never: %s; the name is %q, the log:\n%s", what, f.name(), f.log)
		}
	}
}

func (f *followed) name() string {
	if w := f.State().WorkloadByUID("u"); w != nil {
		return w.Name
	}
	return ""
}

func (f *followed) becomes(name string) {
	f.t.Helper()
	f.eventually("is named "+name, func() bool { return f.name() == name })
}

func (f *followed) logs(text string, times int) {
	f.t.Helper()
	f.eventually(fmt.Sprintf("logs %d times: %s", times, text), func() bool { return strings.Count(f.log.String(), text) == times })
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFollowRename(t *testing.T) {
	f := followFile(t)
	_, changed := f.Watch()
	for _, name := range []string{"two", "three"} {
		write(t, f.path+".new", naming(name))
		must(t, os.Rename(f.path+".new", f.path))
		f.becomes(name)
	}
	select {
	case <-changed:
	default:
		t.Error("the state changed, and nobody was told")
	}
	_, changed = f.Watch()
	select {
	case <-changed:
		t.Error("told of a change that is known")
	default:
	}
}

// Whoever writes into a file truncates it first.
func TestFollowTruncateAndWrite(t *testing.T) {
	f := followFile(t)
	for _, name := range []string{"two", "three"} {
		write(t, f.path, naming(name))
		f.becomes(name)
	}
	must(t, os.Truncate(f.path, 0))
	f.logs("local.yaml: line 1: the file is empty", 1)
	if f.name() != "three" {
		t.Errorf("an empty file is in force: %q", f.name())
	}
	write(t, f.path, naming("four"))
	f.becomes("four")
}

// Kubernetes: the file is a link through ..data, which is a link to a directory
// and is replaced.
func TestFollowLinks(t *testing.T) {
	dir := t.TempDir()
	version := func(name string) {
		must(t, os.Mkdir(filepath.Join(dir, ".."+name), 0o700))
		write(t, filepath.Join(dir, ".."+name, "local.yaml"), naming(name))
		must(t, os.Symlink(".."+name, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	version("one")
	path := filepath.Join(dir, "local.yaml")
	must(t, os.Symlink("..data/local.yaml", path))
	f := follow(t, path)
	version("two")
	must(t, os.RemoveAll(filepath.Join(dir, "..one")))
	f.becomes("two")
	version("three")
	f.becomes("three")
}

// Nothing happens in the watched directory then.
func TestFollowLinkIntoAnotherDirectory(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "elsewhere.yaml")
	write(t, elsewhere, naming("one"))
	path := filepath.Join(t.TempDir(), "local.yaml")
	must(t, os.Symlink(elsewhere, path))
	f := follow(t, path)
	write(t, elsewhere, naming("two"))
	f.becomes("two")
}

func TestFollowAnotherDirectory(t *testing.T) {
	f := followFile(t)
	dir := filepath.Dir(f.path)
	must(t, os.Rename(dir, dir+".old"))
	defer os.RemoveAll(dir + ".old")
	must(t, os.Mkdir(dir, 0o700))
	write(t, f.path, naming("two"))
	f.becomes("two")
}

func TestBadEdit(t *testing.T) {
	f := followFile(t)
	_, changed := f.Watch()
	write(t, f.path, naming("two")+"  protocol: HBONE\n")
	f.logs("local.yaml: line 3: did not find expected key", 1)
	write(t, f.path, "workloads:\n- name: two\n  ip: 1\n")
	f.logs(`local.yaml: line 3: workloads[0]: unknown key \"ip\"`, 1)
	select {
	case <-changed:
		t.Error("a bad edit changed something")
	default:
	}
	if f.name() != "one" {
		t.Errorf("the name is %q", f.name())
	}
	write(t, f.path, naming("three"))
	f.becomes("three")
}

func TestVanish(t *testing.T) {
	f := followFile(t)
	must(t, os.Remove(f.path))
	f.logs("the configuration is gone; what it said stays in force", 1)
	if f.name() != "one" {
		t.Errorf("the name is %q", f.name())
	}
	write(t, f.path, naming("one"))
	f.logs("the configuration can be read again", 1)
	write(t, f.path, naming("two"))
	f.becomes("two")
}

// What would block its reader, or never end, is not read.
func TestNoRegularFile(t *testing.T) {
	f := followFile(t)
	must(t, os.Remove(f.path))
	must(t, syscall.Mkfifo(f.path, 0o600))
	f.logs("this is no regular file", 1)
	must(t, os.Remove(f.path))
	write(t, f.path, naming("two"))
	f.becomes("two")

	for _, path := range []string{"/dev/zero", t.TempDir()} {
		if _, err := Open(path, "", f.log.logger()); err == nil || !strings.Contains(err.Error(), path+": this is no regular file; put the configuration into one") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	log := (&logbook{}).logger()
	path := filepath.Join(t.TempDir(), "local.yaml")
	if _, err := Open(path, "", log); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("no file: %v", err)
	}
	write(t, path, "workloads:\n- x: y\n")
	var fe *FileError
	if _, err := Open(path, "", log); !errors.As(err, &fe) || !strings.HasPrefix(err.Error(), path+": line 2: ") {
		t.Errorf("a bad file: %v", err)
	}
	if _, err := FromInline("[]", "", log); !errors.As(err, &fe) || !strings.HasPrefix(err.Error(), "inline configuration: line 1: ") {
		t.Errorf("a bad text: %v", err)
	}
}

func TestWarningsAreLogged(t *testing.T) {
	text := matching("{principal: [x]}")
	const want = `but: line 3: policies[0].rules[0][0][0]: the unknown key \"principal\" is ignored`
	var log logbook
	if _, err := FromInline(text, "", log.logger()); err != nil || strings.Count(log.String(), want) != 1 {
		t.Errorf("%v; the log: %s", err, &log)
	}
	f := followFile(t)
	write(t, f.path, text)
	f.logs(want, 1)
}

// Close waits for the watcher, may come twice, and leaves the state.
func TestCloseStore(t *testing.T) {
	f := followFile(t)
	f.Close()
	write(t, f.path, naming("two"))
	f.Close()
	if f.name() != "one" {
		t.Errorf("the name is %q", f.name())
	}
	s, err := FromInline("{}", "", f.log.logger())
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestLocal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := FromInline(naming("a")+"- {uid: v, name: b, namespace: demo, serviceAccount: sa, node: n2, workloadIps: [], services: {}}\n", "n2", (&logbook{}).logger())
		if err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		w, err := s.Local(t.Context(), "b", "demo", "sa")
		if err != nil || w.UID != "v" || time.Since(started) != 0 {
			t.Errorf("%+v, %v", w, err)
		}
		_, err = s.Local(t.Context(), "a", "demo", "sa") // on no node
		var ue *UnknownLocalError
		if !errors.As(err, &ue) || err.Error() != "failed to fetch information about local workload: sa.demo (a)" || time.Since(started) != LocalWait {
			t.Errorf("%v after %v", err, time.Since(started))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Local(ctx, "a", "demo", "sa"); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// A pod may be there before its workload.
func TestLocalWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore("", (&logbook{}).logger())
		done := make(chan *Workload)
		go func() {
			w, _ := s.Local(t.Context(), "later", "demo", "sa")
			done <- w
		}()
		for _, name := range []string{"other", "later"} {
			time.Sleep(2 * time.Second) // of the bubble's time
			s.set(parse(t, naming(name)))
		}
		if w := <-done; w == nil || w.Name != "later" {
			t.Errorf("%+v", w)
		}
	})
}
