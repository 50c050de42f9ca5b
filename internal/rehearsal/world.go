package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// world is an agent, two node namespaces for ztunnels, and pods.
type world struct {
	dir          string
	cni, ztunnel string
	log          io.Writer
	pods         []*netns.NS
	names        []string    // of all namespaces made
	opened       []*netns.NS // all that are open, to be closed
	running      []*process
}

// newWorld builds it. Close what it returns, even with an error.
func newWorld(ctx context.Context, pods int, cni, ztunnel string, log io.Writer) (*world, error) {
	w := &world{log: log}
	var err error
	if w.cni, err = filepath.Abs(cni); err != nil {
		return w, err
	}
	if w.ztunnel, err = filepath.Abs(ztunnel); err != nil {
		return w, err
	}
	if w.dir, err = os.MkdirTemp("", "rehearsal"); err != nil {
		return w, err
	}
	fmt.Fprintf(log, "making %d pods\n", pods)
	for _, node := range []string{"node-a", "node-b"} {
		if _, err := w.namespace(ctx, node); err != nil {
			return w, err
		}
	}
	for i := range pods {
		ns, err := w.namespace(ctx, podName(i))
		if err != nil {
			return w, err
		}
		w.pods = append(w.pods, ns)
	}
	agent, err := w.start(ctx, w.cni, "serve", "--zds-uds", w.zds(), "--control-uds", w.control())
	if err != nil {
		return w, err
	}
	return w, waitUntil(ctx, "the agent's sockets", func() bool {
		_, err := os.Stat(w.control())
		return err == nil || agent.ended()
	})
}

func podName(i int) string       { return fmt.Sprintf("pod-%d", i) }
func (w *world) zds() string     { return filepath.Join(w.dir, "zds.sock") }
func (w *world) control() string { return filepath.Join(w.dir, "control.sock") }

// namespace makes one with lo up.
func (w *world) namespace(ctx context.Context, name string) (*netns.NS, error) {
	w.names = append(w.names, name)
	for _, args := range [][]string{{"netns", "add", name}, {"-n", name, "link", "set", "lo", "up"}} {
		if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	return w.open(name)
}

func (w *world) open(name string) (*netns.NS, error) {
	ns, err := netns.Open("/var/run/netns/" + name)
	if err == nil {
		w.opened = append(w.opened, ns)
	}
	return ns, err
}

// addPods tells the agent of all pods, with its verb.
func (w *world) addPods(ctx context.Context) error {
	var wg sync.WaitGroup
	errs := make([]error, len(w.pods))
	slots := make(chan struct{}, 4)
	for i := range w.pods {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			out, err := exec.CommandContext(ctx, w.cni, "add", podName(i), "--control-uds", w.control()).CombinedOutput()
			if err != nil {
				errs[i] = fmt.Errorf("cni-emulator add %s: %w: %s", podName(i), err, out)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// ztunnel is one ztunnel-emulator in a node's namespace.
type ztunnel struct {
	*process
	node    *netns.NS
	started time.Time
}

func (w *world) startZtunnel(ctx context.Context, node string) (*ztunnel, error) {
	ns, err := w.open(node)
	if err != nil {
		return nil, err
	}
	started := time.Now()
	p, err := w.start(ctx, "ip", "netns", "exec", node, w.ztunnel, "--inpod-uds", w.zds())
	if err != nil {
		return nil, err
	}
	return &ztunnel{process: p, node: ns, started: started}, nil
}

// waitReady waits for 200 from the readiness port, and returns how long it took
// since the start.
func (w *world) waitReady(ctx context.Context, z *ztunnel) (time.Duration, error) {
	err := waitUntil(ctx, "ztunnel's readiness", func() bool {
		if z.ended() {
			return true
		}
		var conn net.Conn
		if _, err := z.node.Do(func() (err error) {
			conn, err = net.Dial("tcp", "127.0.0.1:15021")
			return err
		}); err != nil {
			return false
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Second))
		fmt.Fprint(conn, "GET /healthz/ready HTTP/1.0\r\n\r\n")
		answer, _ := io.ReadAll(conn)
		return bytes.Contains(answer, []byte(" 200 OK"))
	})
	if err == nil && z.ended() {
		err = errors.New("ztunnel has ended")
	}
	return time.Since(z.started), err
}

// close ends all processes and removes all namespaces.
func (w *world) close() {
	for _, p := range w.running {
		p.end(unix.SIGKILL)
	}
	for _, ns := range w.opened {
		ns.Close()
	}
	for _, name := range w.names {
		exec.Command("ip", "netns", "delete", name).Run()
	}
	os.RemoveAll(w.dir)
}

// process is a program that was started, and is waited for by one goroutine.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

func (w *world) start(ctx context.Context, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, name, args...), done: make(chan struct{})}
	if os.Getenv("REHEARSAL_LOG") != "" {
		p.cmd.Stderr = w.log
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.wait()
	w.running = append(w.running, p)
	return p, nil
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// end signals the process and waits for it. `ip netns exec` has become it.
func (p *process) end(sig unix.Signal) error {
	if !p.ended() {
		p.cmd.Process.Signal(sig)
	}
	<-p.done
	return p.err
}

func waitUntil(ctx context.Context, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}
