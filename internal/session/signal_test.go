package session

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A second signal ends ztunnel-emulator at once, whatever it is doing: here it
// can't say "listeners ready", because nobody reads its full stdout.
func TestSecondSignalEndsAtOnce(t *testing.T) {
	bin := build(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fill(t, w)

	path := filepath.Join(t.TempDir(), "zt.sock")
	zt := exec.Command(filepath.Join(bin, "ztunnel-emulator"), path)
	zt.Stdout = w
	if err := zt.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	ended := make(chan error, 1)
	go func() { ended <- zt.Wait() }()
	waitFor(t, "the socket", func() bool { _, err := os.Lstat(path); return err == nil })

	ns := "second-signal"
	if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("ip", "netns", "delete", ns).Run()
	var exit *exec.ExitError
	err = exec.Command(filepath.Join(bin, "cni-emulator"), "--timeout", "300ms", path, "/var/run/netns/"+ns).Run()
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("the sender is told %v, want exit code 3", err)
	}

	zt.Process.Signal(unix.SIGTERM)
	select {
	case err := <-ended:
		t.Fatalf("ended after one signal, so this test shows nothing: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	zt.Process.Signal(unix.SIGTERM)
	select {
	case err := <-ended:
		if !errors.As(err, &exit) || exit.Sys().(interface{ Signal() unix.Signal }).Signal() != unix.SIGTERM {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("still there after the second signal")
		zt.Process.Kill()
		<-ended
	}
}

// fill writes to a pipe until it takes no more.
func fill(t *testing.T, w *os.File) {
	t.Helper()
	fd := int(w.Fd()) // blocking from here on, as a child expects
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := unix.Write(fd, make([]byte, 4096)); err != nil {
			break
		}
	}
	for {
		if _, err := unix.Write(fd, []byte{0}); err != nil {
			break
		}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}
