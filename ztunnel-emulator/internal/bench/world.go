package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/fresh"
)

// world is the namespaces to measure in, sets of the same size: what is measured
// and its floor never share one, so neither warms it for the other.
type world struct {
	dir              string
	pods, floor, zds []string // paths, as `ip netns` makes them
}

func (w *world) socket() string    { return filepath.Join(w.dir, "zt.sock") }
func (w *world) zdsSocket() string { return filepath.Join(w.dir, "zds.sock") }
func (w *world) podsDir() string   { return filepath.Join(w.dir, "pods") }

// makeWorld makes 3n namespaces under dir, with lo up. They live as long as the
// mount namespace that this process was started in.
func makeWorld(dir string, n int) (*world, error) {
	w := &world{dir: dir}
	var err1, err2, err3 error
	w.pods, err1 = makePods(w.podsDir(), n, true)
	w.floor, err2 = makePods(filepath.Join(dir, "floor"), n, true)
	w.zds, err3 = makePods(filepath.Join(dir, "zds"), n, true)
	return w, errors.Join(err1, err2, err3)
}

// makePods makes n namespaces in a folder and returns their paths.
func makePods(folder string, n int, loUp bool) ([]string, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	paths := make([]string, n)
	for i := range paths {
		paths[i] = filepath.Join(folder, fmt.Sprintf("pod%d", i))
	}
	done := make(chan error, 1)
	go func() {
		// The lock is kept: the thread dies with the goroutine.
		runtime.LockOSThread()
		for _, path := range paths {
			if err := makeNamespace(path, loUp); err != nil {
				done <- fmt.Errorf("make a network namespace at %s: %w", path, err)
				return
			}
		}
		done <- nil
	}()
	return paths, <-done
}

// makeNamespace moves the calling thread into a fresh network namespace and
// gives that a path, by a bind mount as `ip netns add` does.
func makeNamespace(path string, loUp bool) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if loUp {
		if err := fresh.LoUp(); err != nil {
			return err
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.NewSyscallError("mount", unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))
}
