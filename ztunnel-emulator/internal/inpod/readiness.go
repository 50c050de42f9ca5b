package inpod

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// ReadinessPort is ztunnel's, fixed: two ztunnels need two network namespaces.
const ReadinessPort = 15021

// Readiness is what a kubelet asks ztunnel for: nothing pending, or what is.
type Readiness struct {
	mu      sync.Mutex
	pending map[string]struct{}
}

// Block adds a task that has to end before ztunnel is ready.
func (r *Readiness) Block(task string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending == nil {
		r.pending = make(map[string]struct{})
	}
	r.pending[task] = struct{}{}
}

// Done ends a task, and returns false if it had ended before.
func (r *Readiness) Done(task string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, was := r.pending[task]
	delete(r.pending, task)
	return was
}

// Pending lists the tasks that have not ended, sorted.
func (r *Readiness) Pending() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	tasks := make([]string, 0, len(r.pending))
	for task := range r.pending {
		tasks = append(tasks, task)
	}
	slices.Sort(tasks)
	return tasks
}

// ServeHTTP answers GET /healthz/ready in the real ztunnel's words.
func (r *Readiness) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	switch {
	case req.URL.Path != "/healthz/ready":
		w.WriteHeader(http.StatusNotFound)
		return
	case req.Method != http.MethodGet:
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	if pending := r.Pending(); len(pending) > 0 {
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprintf(w, "not ready, pending: %s\n", strings.Join(pending, ", "))
		return
	}
	fmt.Fprint(w, "ready\n")
}
