package conformance

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
)

// acceptVerbs serves add and del: a line of words, and the namespace as a
// descriptor; the answer is what went wrong, or nothing.
func (a *fakeAgent) acceptVerbs(l *net.UnixListener) {
	for {
		go a.verb(must(l.AcceptUnix()))
	}
}

func (a *fakeAgent) verb(c *net.UnixConn) {
	defer c.Close()
	buf := make([]byte, 4096)
	n, fd, err := fdpass.Recv(c, buf)
	w := strings.Split(string(buf[:max(n, 0)]), "\n")
	if err != nil || len(w) != 5 {
		return
	}
	p := &toldPod{uid: w[1], name: w[2], namespace: w[3], account: w[4], fd: fd}
	failure := ""
	for _, answer := range a.tell(p, w[0] == "del") {
		if nack := <-answer; nack != "" && w[0] == "add" && !a.is("mute") {
			failure = nack
		}
	}
	if w[0] == "del" {
		unix.Close(fd)
		if a.is("del-needs-one") && len(a.links) == 0 {
			failure = "no ztunnel"
		}
	}
	io.WriteString(c, failure)
}

// tell queues an update at whom it concerns.
func (a *fakeAgent) tell(p *toldPod, del bool) (answers []chan string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	to := a.links
	if del {
		if !a.is("cache-forgets-nothing") {
			a.pods = slices.DeleteFunc(a.pods, func(o *toldPod) bool { return o.uid == p.uid })
		}
		if a.is("del-newest") {
			to = to[max(len(to)-1, 0):]
		}
		if a.is("del-oldest") {
			to = to[:min(len(to), 1)]
		}
	} else {
		a.pods = append(a.pods, p)
		switch {
		case a.is("add-all"):
		case a.is("add-oldest"):
			to = to[:min(len(to), 1)]
		default:
			to = to[max(len(to)-1, 0):]
		}
	}
	for _, k := range to {
		if k.busy && a.is("add-lost") {
			continue
		}
		answer := make(chan string, 1)
		k.updates <- update{p, del, answer}
		answers = append(answers, orGone(answer, k.gone))
	}
	return answers
}

// orGone is an answer, or that there will be none.
func orGone(answer chan string, gone chan struct{}) chan string {
	out := make(chan string, 1)
	go func() {
		select {
		case s := <-answer:
			out <- s
		case <-gone:
			out <- "connection closed"
		}
	}()
	return out
}

// runFakeVerb is the hook: add or del, then uid, name, namespace, account, netns.
func runFakeVerb(control, verb string, w []string) {
	c := must(net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: control}))
	f := must(os.Open(w[4]))
	must(0, fdpass.Send(c, []byte(strings.Join(append([]string{verb}, w[:4]...), "\n")), int(f.Fd())))
	if failure := must(io.ReadAll(c)); len(failure) > 0 {
		must(0, errors.New(string(failure)))
	}
	os.Exit(0)
}
