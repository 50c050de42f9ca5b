package workload

import "strings"

// advice says which key was meant, or which there are.
func advice(name string, keys []string) string {
	best, least := "", len(name)/2+1
	for _, k := range keys {
		if d := distance(strings.ToLower(name), strings.ToLower(k)); d < least {
			best, least = k, d
		}
	}
	if best == "" {
		return "there are " + strings.Join(keys, ", ")
	}
	return "did you mean " + best + "?"
}

// distance is how many letters must be added, removed or changed (Levenshtein).
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a) // nobody's slip of the finger
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := before
			if a[i] != b[j] {
				change++
			}
			before = row[j+1]
			row[j+1] = min(change, before+1, row[j]+1)
		}
	}
	return row[len(b)]
}
