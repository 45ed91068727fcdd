package ignition

// Translate turns a Butane config into Ignition. Files that it embeds (local, trees) are read below filesDir; where that is empty, such
// fields are faults. Keys that Butane does not know are faults too.
func Translate(raw []byte, filesDir string) (ignition []byte, warnings []string, err error) {
	return nil, nil, nil
}
