package conformance

import (
	"io"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a command that the suite has started, in a process group of its
// own, so that a wrapper's children end with it.
type process struct {
	cmd  *exec.Cmd
	tail *tail
	done chan struct{} // closed when it has been waited for
}

// startProcess starts args. What it prints goes to out too, unless that is nil.
func startProcess(args []string, out io.Writer) (*process, error) {
	p := &process{cmd: exec.Command(args[0], args[1:]...), tail: &tail{also: out}, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.tail, p.tail
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = time.Second // a grandchild may keep the pipe open
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.reap()
	return p, nil
}

// reap waits for the process; stop waits for reap.
func (p *process) reap() {
	p.cmd.Wait() // the exit status is in ProcessState
	close(p.done)
}

// exited tells whether it has ended, and with which status (-1: by a signal).
func (p *process) exited() (status int, ended bool) {
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), true
	default:
		return 0, false
	}
}

// stop ends the process and its group, politely at first. As long as one member
// lives the kernel gives the group's id to nobody else.
func (p *process) stop() {
	group := -p.cmd.Process.Pid
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		for deadline := time.Now().Add(8 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if unix.Kill(group, sig) == unix.ESRCH {
				<-p.done
				return
			}
			if sig == unix.SIGTERM {
				sig = 0 // once is enough; from now on only ask
			}
		}
	}
	<-p.done
}

// tail keeps the last of what is written to it, for an error's sake.
type tail struct {
	mu   sync.Mutex
	last []byte
	also io.Writer
}

const tailSize = 500

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, b...)
	if len(t.last) > tailSize {
		t.last = append([]byte(nil), t.last[len(t.last)-tailSize:]...)
	}
	if t.also != nil {
		t.also.Write(b)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return oneLine(string(t.last))
}
