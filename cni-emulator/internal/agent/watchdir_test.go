package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/netns/netnstest"
)

// The directory, and those above it, come, go and come again.
func TestWatchedDirectoryComesAndGoes(t *testing.T) {
	cfg, dir := watching(t)
	n := startWith(t, cfg, nil)
	n.names()
	for i := range 3 {
		one, two := netnstest.New(t), netnstest.New(t)
		mkdir(t, dir)
		nsFile(t, filepath.Join(dir, "one"), one)
		nsFile(t, filepath.Join(dir, "two"), two)
		n.names("one", "two")
		rm(t, filepath.Join(dir, "one"))
		n.names("two")
		unix.Unmount(filepath.Join(dir, "two"), unix.MNT_DETACH)
		switch i {
		case 0:
			if err := os.RemoveAll(filepath.Dir(dir)); err != nil {
				t.Fatal(err)
			}
		case 1:
			if err := os.Rename(dir, dir+".old"); err != nil {
				t.Fatal(err)
			}
		case 2:
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		n.names()
	}
}

// A pod that went while the agent was dead is gone; the others come back once.
func TestWatchAcrossRestart(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	for _, name := range []string{"stays", "goes"} {
		nsFile(t, filepath.Join(dir, name), netnstest.New(t))
	}
	n := startWith(t, cfg, nil)
	n.names("stays", "goes")
	n.stop()
	rm(t, filepath.Join(dir, "goes"))
	n = startWith(t, cfg, nil)
	if z := n.ztunnel(); len(z.held) != 1 {
		t.Errorf("%d pods in the snapshot", len(z.held))
	}
	n.names("stays")
	rm(t, filepath.Join(dir, "stays"))
	n.names()
}

// What goes between the look at the state file and the one at the directory has
// no event: the pods themselves tell.
func TestWatchGoneBeforeFirstLook(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	cfg.Match = "*"
	for _, name := range []string{"stays", "goes", "kept", uuidName} {
		nsFile(t, filepath.Join(dir, name), netnstest.New(t))
	}
	person := netnstest.New(t)
	nsFile(t, filepath.Join(dir, "person"), person)
	n := startWith(t, cfg, nil)
	n.names("stays", "goes", "kept", "person", uuidName)
	n.addNow(control.PodID{UID: control.DefaultUID("default", "person"), Name: "person", Namespace: "default", ServiceAccount: "x", Path: filepath.Join(dir, "person")}, person)
	n.stop()

	unbind(t, filepath.Join(dir, "kept"))
	late := cfg
	late.Watch = ""
	n = startWith(t, late, func(a *Agent) {
		for _, name := range []string{"goes", "kept", "person"} {
			rm(t, filepath.Join(dir, name))
		}
		var err error
		if a.watcher, err = newWatcher(a, dir, ""); err != nil {
			t.Fatal(err)
		}
	})
	n.names("stays", "person", uuidName)
	// One that came by another --match leaves like any other.
	rm(t, filepath.Join(dir, uuidName))
	n.names("stays", "person")
}

// Events that the kernel has dropped are made up for.
func TestWatchOverflow(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	nsFile(t, filepath.Join(dir, "before"), netnstest.New(t))
	overflow := make(chan error)
	n := startWith(t, cfg, func(a *Agent) {
		a.watcher.events, a.watcher.errors = make(chan fsnotify.Event), overflow
	})
	n.names("before")
	rm(t, filepath.Join(dir, "before"))
	nsFile(t, filepath.Join(dir, "lost"), netnstest.New(t))
	overflow <- fsnotify.ErrEventOverflow
	n.names("lost")
	n.await("events of the watched directory were lost")
}

// The path leads to another directory, and inotify has nothing to say about it.
func TestWatchedDirectoryIsMountedOn(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	n := startWith(t, cfg, nil)
	nsFile(t, filepath.Join(dir, "below"), netnstest.New(t))
	n.names("below")
	for range 2 {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(os.NewSyscallError("mount", err))
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		n.names()
		nsFile(t, filepath.Join(dir, "above"), netnstest.New(t))
		n.names("above")
		unbind(t, filepath.Join(dir, "above"))
		unbind(t, dir)
		n.names("below")
		nsFile(t, filepath.Join(dir, "more"), netnstest.New(t))
		n.names("below", "more")
		rm(t, filepath.Join(dir, "more"))
		n.names("below")
	}
	n.await("the watched directory was mounted on, unmounted or replaced")
}

// As ip-netns(8) does at its first add: the same directory, mounted on itself.
func TestWatchedDirectoryIsMountedOnItself(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	n := startWith(t, cfg, nil)
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(os.NewSyscallError("mount", err))
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	nsFile(t, filepath.Join(dir, "web"), netnstest.New(t))
	n.names("web")
	rm(t, filepath.Join(dir, "web"))
	n.names()
}
