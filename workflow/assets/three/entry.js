export { BufferAttribute, BufferGeometry, CanvasTexture, NearestFilter, NoColorSpace, PerspectiveCamera, Points, Scene, ShaderMaterial, WebGLRenderer } from "three";
export { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";
