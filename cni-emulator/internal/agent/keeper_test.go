package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ambient-emulator/internal/netns/netnstest"
)

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
	if _, err := n.add(named("web"), web, 0); err == nil || !strings.Contains(err.Error(), "the agent's next start will not know of it: write the state file: ") {
		t.Errorf("add: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.add(named("web"), web, 0); err != nil {
		t.Errorf("add: %v", err)
	}
}

// What could not be written is tried again, though nobody changes anything.
func TestStateIsWrittenAgain(t *testing.T) {
	cfg := restarting(t)
	fails := make(chan error)
	n := startWith(t, cfg, func(a *Agent) {
		a.keeper.write = func(path string, m memory) error {
			if err := <-fails; err != nil {
				return err
			}
			return writeState(path, m)
		}
	})
	added := make(chan error)
	go func() { _, err := n.add(named("web"), netnstest.New(t), 0); added <- err }()
	full := errors.New("the disk is full")
	fails <- full
	if err := <-added; err == nil || !strings.Contains(err.Error(), full.Error()) {
		t.Errorf("add: %v", err)
	}
	fails <- full
	fails <- nil
	n.await(`msg="the state file is written again"`)
	if m, _, err := readState(cfg.State); err != nil || len(m.Pods) != 1 {
		t.Errorf("the state file has %v, %v", m, err)
	}

	// An agent that stops does not leave it for later.
	go func() { added <- n.del(named("web"), 0) }()
	fails <- full
	<-added
	close(fails)
	n.stop()
	if m, _, err := readState(cfg.State); err != nil || len(m.Pods) != 0 {
		t.Errorf("the state file has %v, %v", m, err)
	}
}

// No verb is done before its change is on disk, even when ztunnel has answered.
func TestVerbsWaitForTheDisk(t *testing.T) {
	writing, goOn := make(chan struct{}), make(chan struct{})
	n := startWith(t, restarting(t), func(a *Agent) {
		a.keeper.write = func(path string, m memory) error {
			writing <- struct{}{}
			<-goOn
			return writeState(path, m)
		}
	})
	web := netnstest.New(t)
	add := func(wait time.Duration) func() error {
		return func() error { _, err := n.add(named("web"), web, wait); return err }
	}
	del := func(wait time.Duration) func() error {
		return func() error { return n.del(named("web"), wait) }
	}
	var z *peer
	for _, verb := range []func() error{add(0), del(0), add(patience), del(patience)} {
		done := make(chan error, 1)
		go func() { done <- verb() }()
		<-writing
		if z != nil {
			z.next()
			z.ack()
		}
		select {
		case err := <-done:
			t.Fatalf("done before its change is on disk: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		goOn <- struct{}{}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if z == nil && len(n.list()) == 0 {
			z = n.ztunnel()
		}
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
