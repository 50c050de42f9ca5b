package main

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// floor is the least that giving a pod its listeners can cost: one thread and
// nothing but the system calls that can't be left out. It calls setns by itself,
// unlike everything else here, because internal/netns is what it is held against.
type floor struct {
	paths chan []string
	took  chan floorResult
	fds   []int // the listeners, which stay open as a pod's do
}

type floorResult struct {
	times samples
	err   error
}

func newFloor() *floor {
	f := &floor{paths: make(chan []string), took: make(chan floorResult)}
	go f.run()
	return f
}

// visit gives each of the namespaces its listeners and says how long that took.
func (f *floor) visit(paths []string) (samples, error) {
	f.paths <- paths
	r := <-f.took
	return r.times, r.err
}

// close closes the listeners and ends the thread.
func (f *floor) close() {
	close(f.paths)
	<-f.took
}

// run is the thread. The lock is kept, so it dies with the goroutine.
func (f *floor) run() {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for paths := range f.paths {
		r := floorResult{err: err}
		for _, path := range paths {
			if r.err != nil {
				break
			}
			var d time.Duration
			d, r.err = f.one(home, path)
			r.times = append(r.times, d)
		}
		f.took <- r
	}
	unix.Close(home)
	for _, fd := range f.fds {
		unix.Close(fd)
	}
	f.took <- floorResult{}
}

// one is one visit.
func (f *floor) one(home int, path string) (time.Duration, error) {
	pod, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(pod)
	var fds [len(inpod.Ports)]int

	start := time.Now()
	err = unix.Setns(pod, unix.CLONE_NEWNET)
	for i, port := range inpod.Ports {
		if err != nil {
			break
		}
		if fds[i], err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
			break
		}
		if err = unix.Bind(fds[i], &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			break
		}
		err = unix.Listen(fds[i], 4096)
	}
	back := unix.Setns(home, unix.CLONE_NEWNET)
	took := time.Since(start)

	if err == nil {
		err = back
	}
	if err != nil {
		return 0, fmt.Errorf("the floor's visit to %s: %w", path, err)
	}
	f.fds = append(f.fds, fds[:]...)
	return took, nil
}
