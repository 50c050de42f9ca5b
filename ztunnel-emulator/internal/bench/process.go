package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// process is one of the two programs, running. Its stdout is /dev/null and its
// log a file in memory, so that nobody is held up by a reader.
type process struct {
	cmd *exec.Cmd
	log string
}

// settleTime is how long a process is left alone before it is looked at.
const settleTime = 200 * time.Millisecond

func startProcess(ctx context.Context, w *world, program string, args ...string) (*process, error) {
	return startLogged(ctx, filepath.Join(w.dir, filepath.Base(program)+".log"), program, args...)
}

func startLogged(ctx context.Context, logFile, program string, args ...string) (*process, error) {
	log, err := os.Create(logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{cmd: exec.CommandContext(ctx, program, args...), log: log.Name()}
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(unix.SIGTERM) }
	p.cmd.WaitDelay = settleTime // after which it is killed
	p.cmd.Stderr = log
	// Nobody is connected to the pods at the end: there is nothing to wait for.
	// await reads the log.
	p.cmd.Env = append(os.Environ(), "CONNECTION_TERMINATION_DEADLINE=0s", "RUST_LOG=info")
	return p, p.cmd.Start()
}

// startReceiver starts a ztunnel-emulator of the seed's mode.
func startReceiver(ctx context.Context, program string, w *world) (*process, error) {
	p, err := startProcess(ctx, w, program, w.socket())
	if err != nil {
		return nil, err
	}
	if _, err := p.await("listening for pods"); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

// await waits until the log has a line with such words, and returns the line.
func (p *process) await(words string) (string, error) {
	for range 5000 {
		b, err := os.ReadFile(p.log)
		if err != nil {
			return "", err
		}
		if at := bytes.Index(b, []byte(words)); at >= 0 {
			line := b[bytes.LastIndexByte(b[:at], '\n')+1:]
			if end := bytes.IndexByte(line, '\n'); end >= 0 {
				return string(line[:end]), nil
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
	return "", fmt.Errorf("%s does not say %q; its log ends with:\n%s", filepath.Base(p.cmd.Path), words, p.lastWords())
}

func (p *process) lastWords() []byte {
	b, _ := os.ReadFile(p.log)
	return b[max(0, len(b)-500):]
}

// stop ends the process and waits until it has gone, and its listeners with it.
func (p *process) stop() error {
	p.cmd.Process.Signal(unix.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w; its log ends with:\n%s", filepath.Base(p.cmd.Path), err, p.lastWords())
	}
	return nil
}

func (p *process) proc(name string) string {
	return fmt.Sprintf("/proc/%d/%s", p.cmd.Process.Pid, name)
}

// usage is what a process holds.
type usage struct {
	files    int // descriptors
	resident int // bytes in memory
}

// look lets the process come to rest, and looks.
func (p *process) look() (usage, error) {
	time.Sleep(settleTime)
	names, err := os.ReadDir(p.proc("fd"))
	if err != nil {
		return usage{}, err
	}
	resident, err := p.resident()
	return usage{files: len(names), resident: resident}, err
}

// resident returns how many bytes of the process are in memory.
func (p *process) resident() (int, error) {
	// Not VmRSS of proc_pid_status(5), which the kernel keeps only roughly.
	b, err := os.ReadFile(p.proc("smaps_rollup"))
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

// ticks returns how long all threads of the process have run, in user and in
// kernel mode, in hundredths of a second (utime and stime of proc_pid_stat(5)).
func (p *process) ticks() (int, error) {
	b, err := os.ReadFile(p.proc("stat"))
	if err != nil {
		return 0, err
	}
	// The second field, the name, may itself hold blanks and brackets.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("%s has %d fields after the name", p.proc("stat"), len(fields))
	}
	user, err1 := strconv.Atoi(string(fields[11]))
	system, err2 := strconv.Atoi(string(fields[12]))
	return user + system, errors.Join(err1, err2)
}
