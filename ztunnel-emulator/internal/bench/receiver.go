package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// receiver is a ztunnel-emulator of its own process. Its stdout is /dev/null
// and its log a file in memory.
type receiver struct {
	cmd *exec.Cmd
	log string
}

// settleTime is how long a process is left alone before it is looked at.
const settleTime = 200 * time.Millisecond

func startReceiver(ctx context.Context, program string, w *world) (*receiver, error) {
	log, err := os.Create(filepath.Join(w.dir, "ztunnel.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	r := &receiver{cmd: exec.CommandContext(ctx, program, w.socket()), log: log.Name()}
	r.cmd.Cancel = func() error { return r.cmd.Process.Signal(unix.SIGTERM) }
	r.cmd.WaitDelay = settleTime // after which it is killed
	r.cmd.Stderr = log
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	for range 1000 {
		b, err := os.ReadFile(r.log)
		if err != nil {
			return nil, errors.Join(err, r.stop())
		}
		if bytes.Contains(b, []byte("listening for pods")) {
			return r, nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil, errors.Join(errors.New("ztunnel-emulator does not listen"), r.stop())
}

// stop ends the process and waits until it has gone, and its listeners with it.
func (r *receiver) stop() error {
	r.cmd.Process.Signal(unix.SIGTERM)
	if err := r.cmd.Wait(); err != nil {
		b, _ := os.ReadFile(r.log)
		return fmt.Errorf("ztunnel-emulator: %w; its log ends with:\n%s", err, b[max(0, len(b)-500):])
	}
	return nil
}

// resident returns how many bytes of the process are in memory.
func (r *receiver) resident() (int, error) {
	// Not VmRSS of proc_pid_status(5), which the kernel keeps only roughly.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", r.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		var kib int
		if n, _ := fmt.Sscanf(string(line), "Rss: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.New("smaps_rollup has no Rss")
}

// files returns how many descriptors the process has open.
func (r *receiver) files() (int, error) {
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", r.cmd.Process.Pid))
	return len(names), err
}
